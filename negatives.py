# SPDX-License-Identifier: MIT
"""Rewrite captions into hard negatives: sentences one edit away from the truth.

"A man riding a brown horse on the beach." becomes up to four sentences that are false of its
picture, one of each type:

  relation   two things change places, or a relation becomes its opposite
  attribute  a colour, size, age, material, number ... becomes another one of its kind
  object     a thing becomes another thing of its kind
  action     an act becomes another act that fits the same grammar

A small tagger reads the words, a chunker finds the noun phrases, and four editors propose edits.
An edit replaces whole words at known offsets; every other character stays as it was.  Where no
edit is safe the negative is null.  All knowledge of words stands in the tables below.

  python negatives.py captions.json --out negatives.jsonl --stats
  python negatives.py --text "A man riding a brown horse on the beach."

CAPTIONS is a manifest (.jsonl), a COCO or Karpathy .json, a .csv or .tsv with a header, or "-"
for lines on stdin.  The output has a header line, then one JSON record for each caption.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["NEGATIVE_TYPES", "DataError", "make_negatives", "read_captions"]

NEGATIVE_TYPES = ("relation", "attribute", "object", "action")
MAX_WORDS = 60  # CLIP reads 77 subwords; an edit behind them would not be seen
CHUNK = 256  # captions handed to a worker at once
SWAP_SHARE = 0.5  # of the relations that allow both, how many change places

# Things.  "class.kind: a/b, c > d; ...": a and b mean the same, words before > become those after
# it, ~ marks a word that is never chosen, * a kind without plural.
THINGS = """
person.adult: man, guy, gentleman, male, dude, fellow > woman, girl; woman, lady, female > man,
  boy; boy > girl, woman; girl > boy, man
person.child: child, kid, toddler, infant, youngster > man, woman
person.baby: baby, newborn > dog, monkey, robot
person.any: person, human > dog, monkey, robot
person.group: couple, family, crowd, team, audience > orchestra, choir
person.young: teenager, teen, adult, youth, student, friend, tourist > toddler, soldier, clown
person.sport: surfer, skier, skateboarder/skater/~skate boarder, snowboarder/~snow boarder,
  cyclist/bicyclist/~biker/~bike rider, swimmer, motorcyclist, jogger/runner, boxer, horseback
  rider; rider, boarder, ~athlete > swimmer, boxer
person.player: tennis player, baseball player/~ball player/~batter/~pitcher/~catcher, soccer
  player, basketball player/~football player, golfer, hockey player; player, umpire, hitter,
  outfielder, referee > dancer, golfer, swimmer
person.work: police officer/policeman/officer/cop, firefighter/fireman, chef/cook, doctor, soldier,
  clown, waiter/waitress, farmer, cowboy, nurse, worker, driver, pilot, vendor, musician
person.kin: bride, groom, mother/mom, father/dad, grandmother, grandfather; pedestrian, passenger,
  spectator, customer, shopper > soldier, clown, firefighter
animal.pet: dog/puppy/~pup, cat/kitten/~kitty/~feline, rabbit/bunny, hamster
animal.farm: horse/pony, cow/~bull/~cattle/~ox/~calf/~steer, sheep/~lamb/~ram, goat, pig,
  donkey/mule, camel
animal.wild: elephant, giraffe, zebra, lion, tiger, rhino, deer, monkey, bear/~polar bear/~brown
  bear, kangaroo, wolf, fox
animal.any: animal > bird, vehicle, robot
animal.bird: duck, goose, seagull/gull, pigeon, parrot, owl, swan, eagle, flamingo, penguin; bird >
  squirrel, lizard, monkey, rabbit
animal.other: squirrel, mouse, turtle, frog, lizard, snake
vehicle.road: car/sedan, truck/~pickup/~pickup truck/~lorry, bus/~double decker bus/~double decker,
  van/minivan, taxi/cab, train/~locomotive/~passenger train, tractor, motorcycle/motorbike/~motor
  bike, scooter/moped, bicycle, trolley/tram, ambulance, fire truck, carriage, ~wagon, jeep; bike >
  horse, car, tractor; vehicle, traffic, automobile > boat, horse, airplane
vehicle.road: shopping cart/cart > sled, tractor
vehicle.air: airplane/plane/jet/~airliner/~jetliner/~aeroplane/~jumbo jet/~biplane, helicopter, hot
  air balloon; aircraft > helicopter, hot air balloon
vehicle.water: boat/ship/~ferry/~sailboat/~sail boat/~speedboat/~yacht > truck, raft, tractor;
  canoe/kayak, raft, paddle boat
gear.board: skateboard/~skate board, surfboard/~surf board, snowboard/~snow board, sled, scooter;
  board > sled, bicycle
gear.ski: ski/~snow ski, roller skate, snowshoe; ski pole, skate > umbrella, broom
gear.ball: ball, ~tennis ball, ~baseball ball, ~soccer ball > frisbee, kite, balloon;
  frisbee/~frisby/~frisbe/disc, boomerang, balloon, kite, beach ball
gear.bat: tennis racket/racket/racquet/~tennis racquet, baseball bat/bat, golf club, hockey stick
gear.glove: baseball glove/glove/mitt/~catcher's mitt, helmet, towel
sport.game*: tennis, baseball, soccer, basketball, football, golf, hockey, volleyball, cricket,
  badminton
sport.event: tennis match/~tennis game, baseball game, soccer game/~soccer match, basketball game,
  football game, hockey game, card game; game, match, video game, wii, nintendo wii > concert,
  movie
device.hand: cell phone/phone/cellphone/telephone/smartphone/mobile phone/iphone/~smart phone,
  camera, radio, calculator, flashlight, game controller/remote/remote control/controller/~wii
  remote
device.desk: laptop/computer/laptop computer/~pc/~desktop/~desktop computer/~notebook/~computer
  monitor/monitor, television/tv/~television set/~flat screen tv, printer, typewriter, radio;
  screen > window, mirror; keyboard/~computer keyboard, ~computer mouse, speaker, lamp
device.kitchen: refrigerator/fridge/~freezer, oven/stove/~stove top, microwave/~microwave oven,
  toaster, dishwasher, washing machine, blender, coffee maker
fixture.bath: toilet/~toilet seat/~toilet bowl/commode, sink/~basin, bathtub/tub/~bath tub/~bath,
  shower, urinal; faucet, toilet paper, shower curtain > towel, soap dish
furniture.seat: couch/sofa/~loveseat, chair/armchair/recliner/~seat/~rocking chair, bench, stool
furniture.top: table/~table top/~dining table/~coffee table/~dining room table/~kitchen
  table/tabletop, desk, counter/countertop/~kitchen counter/~counter top, shelf, dresser,
  nightstand; bookshelf/bookcase, cabinet/cupboard, wardrobe, drawer
furniture.top: surface, rack > shelf, stool
furniture.bed: bed, crib, hammock, couch; mattress, bunk bed > couch, hammock
container.plate: plate/dish/platter, bowl, tray, napkin, paper plate, cutting board/~chopping board
container.cup: cup/mug, ~coffee cup, glass/~wine glass, bottle/~wine bottle/~water bottle, vase,
  pitcher, jar, pot
container.pan: pan/~frying pan/skillet, wok, pot
container.box: box, basket, bucket, bag, suitcase/~luggage, crate, barrel
container.bin: container > basket, suitcase, bucket; trash can/garbage can/~trash bin, mailbox,
  cage
tool.eat: fork, knife, spoon, spatula, ladle, chopstick, whisk; utensil, silverware > screwdriver,
  pencil
tool.hand: toothbrush, comb, razor, pencil, pen, paintbrush, hairbrush; brush, scissors, tool >
  hammer, pencil; umbrella/parasol, flag, cane, fishing rod, broom, lantern; candle > lantern,
  light bulb
food.meal: pizza, sandwich/~sub/~panini, burger/hamburger/~cheeseburger, hot dog/hotdog, salad,
  taco, burrito, omelet/omelette, pancake, waffle; slice, meal, dinner, lunch, breakfast > burger,
  taco
food.sweet: ice cream > cake, salad; cake/~birthday cake/~chocolate cake/~wedding cake,
  donut/doughnut/~pastry, cookie, muffin, cupcake, pie, ice cream cone, brownie; dessert > burger,
  taco
food.bread: bun, bagel, croissant, pretzel
food.fruit: banana, apple, orange, lemon/lime, pear, peach, pineapple, strawberry, grape, mango,
  watermelon; fruit, berry, cherry, kiwi > onion, potato, cookie
food.veg: carrot, potato, onion, cucumber, tomato, mushroom, pepper, radish, pumpkin, pickle,
  olive; vegetable, veggie, bean, pea > cookie, strawberry
food.topping: pepperoni, topping, french fry, fry, chip, noodle, egg > strawberry, cookie
food.mass*: fruit > bread, soup, cheese; bread/~toast, rice, pasta/spaghetti/~macaroni, soup/~stew,
  cheese, chicken/~turkey, beef/steak/~meat, fish/~salmon/~tuna, bacon/ham/~pork/~sausage, cereal,
  ~pizza, ~cake, ~salad; food > wine, paint, laundry
food.green*: broccoli, lettuce/spinach, corn, cauliflower, cabbage, celery, asparagus
food.sauce*: ketchup, mustard, butter, cream, chocolate, honey, jam, mayonnaise; sauce, gravy,
  syrup, icing, frosting, cheese sauce, sugar > snow, mustard
drink.mass*: wine/~red wine/~white wine, beer, coffee, tea, milk, juice/~orange juice, lemonade,
  ~soda; beverage, drink, alcohol, liquor > sandwich, cookie
clothing.top: shirt/~t-shirt/~tee shirt/~t shirt/~jersey, jacket/coat/~hoodie, sweater, dress,
  vest, robe/bathrobe, suit/~business suit/~tuxedo, apron, wetsuit/~wet suit, kimono; uniform,
  outfit, costume, gear, clothing, clothes > towel, blanket
clothing.leg: pants/~trousers/~jeans, shorts/~swim trunks/~trunks, skirt, pajamas, overalls
clothing.head: hat/cap/~baseball cap/~baseball hat/~beanie, helmet, crown, wig, scarf, turban,
  headband
clothing.face: glasses/eyeglasses/~goggles, sunglasses, headphones, earrings
clothing.foot: shoe/sneaker, boot, sandal/~flip flop, sock, slipper
clothing.neck: tie/necktie/~neck tie/~bow tie/~bowtie, scarf, necklace, badge
clothing.hand: purse/handbag/~bag, backpack/~back pack/~pack, suitcase/~luggage/~briefcase,
  umbrella, guitar; mask, watch, collar, ribbon, leash > scarf, bell
home.soft: pillow/cushion, blanket/quilt/comforter/~bedspread, towel, curtain/~drape,
  rug/carpet/~mat, tablecloth, sheet
home.wall: door/doorway > window, gate, curtain; mirror, painting/~artwork, window, clock, poster,
  fireplace, bookcase; photograph, picture frame, vent, outlet, blind > mirror, clock; wall >
  fence, window, door
home.light: lamp/~light fixture, chandelier, ceiling fan, candle; floor, ceiling, tile, sill,
  window sill > wall, roof, door
home.toy: teddy bear/stuffed animal/~teddy/~stuffed bear/~stuffed toy, doll, robot, puppet; toy,
  figurine, statue/sculpture > balloon, lamp, candle
home.read: book, newspaper, magazine, letter, map, envelope; paper, card, note, document > book,
  blanket; menu, notebook > book, newspaper
structure.house: house, church/cathedral, castle, skyscraper, barn, tent, lighthouse, hotel,
  factory, windmill; building, home, tower, steeple, shed, cabin, clock tower > tree, tent,
  mountain
structure.pole: pole, post, column > tree, wall, ladder
structure.fence: fence/~railing/~rail/~chain link fence, hedge, gate, ladder, staircase/~stair;
  bridge, tunnel, archway; roof, balcony, porch, patio, deck > garden, staircase
structure.street: traffic light/~stop light/~stoplight/~traffic signal/~street light/~light, stop
  sign/~street sign/~sign/~traffic sign/~road sign, parking meter/~meter, fire hydrant/hydrant,
  mailbox, telephone booth, fountain, billboard, bench, flagpole; cone, curb, sculpture > mailbox,
  fountain; street lamp, telephone pole, lamp post > flagpole, fountain
structure.dock: pier/dock, bridge, lighthouse
place.road: street/road/~roadway/~highway/~lane/~avenue/~freeway, sidewalk/~walkway/~pavement,
  path/~trail/~pathway, driveway, railroad track/~track/~train track/~railway/~railroad, river;
  corner, street corner, intersection, crosswalk, crossing > bridge, beach, rooftop; parking
  lot/~lot, runway/~tarmac, bridge, rooftop
place.ground: beach/~shore/~seashore/~coast, field/~meadow/~pasture/~grassland,
  forest/~woods/~jungle, desert, garden, park/~yard/~lawn, swamp, parking lot; hill/hillside/~ski
  slope/~slope, mountain/~mountain side/~mountainside, valley, beach, cliff
place.court: tennis court/~court, baseball field/~baseball diamond, golf course, soccer field,
  basketball court; skate park/~skateboard park/~ramp/~skateboard ramp, swimming pool/pool,
  stadium/~arena
place.cage: area > forest, desert; habitat, exhibit, resort, platform, backyard, alley, apartment,
  bay, shoreline, plain > desert, river; enclosure, pen, area > river, swimming pool
place.land*: grass, snow, sand, mud, dirt, gravel, concrete, ice; ground, hay > ice, sand
place.water: lake, river/~stream, pond, swimming pool/pool, puddle, fountain; ocean/sea, desert,
  forest; wave > hill, wall
place.water*: water, surf > sand, snow, mud; rain > snow, fog
sky.any: sky, air > water; cloud, rainbow, star > mountain, balloon
place.room: kitchen, bathroom/restroom/washroom/~rest room/~bath room, bedroom/~bed room, living
  room/~family room, dining room, office/~cubicle, garage, classroom, hallway, hotel room, waiting
  room, room, conference room
place.shop: restaurant/~cafe/~diner, store/shop/~grocery store/supermarket, bakery, museum,
  library, hospital, barber shop, market
place.venue: airport/~terminal, train station/~station/~subway station/~bus station, zoo, school,
  farm, harbor/~marina, church, circus
place.city: city/~downtown/~town, village, desert, forest, farm; neighborhood, countryside >
  desert, harbor
nature.tree: tree/~palm tree/~pine tree, bush/~shrub, cactus, rock/~boulder/~stone, log, haystack;
  plant, potted plant > candle, statue; branch, tree branch, leaf, trunk, tree trunk, stick, twig >
  rope, chain
nature.flower: flower, rose, daisy, tulip, sunflower, ~bouquet > feather, balloon, candle
nature.fire*: fire, smoke, steam > water, snow
"""
# Nouns that are never replaced, by kind.
OTHER_THINGS = """
part: side top bottom back front edge end middle center part distance background foreground left
right rest half base tip point section; body: head hand arm leg foot mouth face hair neck ear eye
tail nose tusk horn tongue tooth finger lap paw beard chest shoulder knee body; feat: trick jump
stunt flip swing turn pitch break; idea: way time day night afternoon morning evening sunset
winter summer wedding party event walk flight show parade race contest competition motion action
style position something thing stuff item object everything anything nothing fun conversation
smile reflection shade shadow shape colour color name number word letter pattern life world
display look stop bite catch hit serve decoration center equipment electronics object light
accessory appliance supplies ingredient condiment dining parking birthday christmas police flat
steel teddy size love sale sun graffiti power case cover lid hole sports engine wheel wing
propeller wire rope pipe frame tape net stall booth island vanity block straw neon design
furniture snack produce attire space weather direction construction; picture: picture photo
photograph image view shot selfie portrait painting drawing closeup scene close-up; measure:
group bunch pile stack row line pair herd flock variety assortment lot set piece collection array
selection series load bouquet bundle handful pack dozen loaf kind type sort number slice"""
HOLDERS = ("measure", "person.group", "container.plate", "container.cup", "container.box")  # of ...
PLURALS = """child:children person:people foot:feet tooth:teeth mouse:mice goose:geese knife:knives
shelf:shelves leaf:leaves wolf:wolves calf:calves sheep:sheep deer:deer fish:fish scarf:scarves
loaf:loaves bookshelf:bookshelves half:halves photo:photos video:videos"""
MOVERS = ("person", "animal", "vehicle")
SEXES = {"man": "M", "boy": "M", "woman": "F", "girl": "F"}
SEXES |= dict.fromkeys(("he", "his", "him", "himself"), "M")
SEXES |= dict.fromkeys(("she", "her", "hers", "herself"), "F")
CHILDREN = ("boy", "girl")
PRONOUNS = set(SEXES) - {"man", "woman", *CHILDREN}

# Values.  Groups end with ;, in a group | parts what excludes each other, its first word is chosen.
# After @ stand the kinds of thing that the row is for.
VALUES = """
age@person animal: elderly old aging older aged | young younger
age: old antique vintage older aged old-fashioned | new modern brand-new
any: many numerous | few; red crimson maroon burgundy | blue navy turquoise teal | green | yellow
  golden gold | orange | purple violet lavender | pink | black dark-colored | white beige cream
  ivory | brown tan | gray grey silver; colorful multicolored multi-colored colored vibrant |
  colorless | black-and-white; large big huge giant enormous gigantic massive oversized jumbo |
  small little tiny miniature mini; tall towering | short; long lengthy | short; wide broad |
  narrow skinny thin; wooden wood | metal steel metallic iron aluminum | plastic | glass | stone
  concrete cement | brick | leather ; grassy grass-covered lush | sandy | snowy snow-covered |
  muddy | rocky gravel | paved asphalt; sunny clear | rainy stormy | cloudy overcast cloud-filled |
  foggy misty hazy; striped | checkered plaid | spotted dotted polka-dot | floral flowered flowery
  | plain; hot warm heated | cold icy chilly cool frozen; wet soaked damp | dry; bright
  brightly-lit well-lit sunlit | dark dim dimly-lit darkened; clean tidy neat | dirty messy filthy
  cluttered grimy; empty vacant bare | full crowded packed filled busy crowded; busy bustling |
  quiet empty deserted; open opened | closed shut; sliced cut chopped | whole; round circular |
  square rectangular; heavy thick | thin; happy smiling cheerful joyful laughing | sad angry crying
  frowning; shirtless | fully-clothed; fresh ripe | rotten moldy; parked stationary stopped |
  moving speeding; left | right; male | female; curly | straight; fluffy furry shaggy hairy fuzzy
  woolly | hairless; deep | shallow; steep | flat; cooked baked grilled roasted toasted fried | raw
  uncooked; indoor | outdoor; rural | urban; fancy ornate elegant elaborate decorative | simple
  plain; broken damaged | intact; rusty rusted | shiny polished; beautiful pretty cute adorable
  lovely attractive | ugly hideous; calm | rough choppy; soft | hard; illuminated | unlit; domestic
  tame | wild
"""
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
YOUNGER = {"young": "baby", "little": "teenage", "small": "teenage"}  # of a boy or girl
OTHER_VALUES = """
same different various other many several few more asian american commercial stuffed professional
stainless nearby public delicious adult tasty nice military electric double single next own
teenage furnished healthy strange unique special typical real fake good great first second last
main covered fenced dressed painted tiled mounted decorated displayed fashioned lined assorted
homemade blurry light dark bald funny ready high low overhead baby multiple larger smaller dead
close"""

# Acts.
POSTURE = "sit stand lie lay kneel crouch squat sleep rest lean pose perch wait relax lounge nap"
MOVING = (
    "walk run jog stroll crawl march hop ski snowboard skateboard skate surf race climb jump leap"
)
ROLLING = "drive travel move go come head cruise roll"
ACTS = f"""
{POSTURE} {MOVING} {ROLLING} dance ride slide sled fly float swim sail soar glide hover burn
explode fall spin crash graze eat feed drink play fight sing cry look stare gaze watch point yell
laugh wave growl bark bow talk speak chat step draw work smile frown reach search hang balance
swing hold carry use throw toss catch kick hit wear read cut slice chop cook prepare make serve
wash clean brush pet hug kiss chase push pull tow lead repair fix paint drop fold iron sew tear
break pour spill peel photograph cross leave enter grab show display lick sniff bite chew shear
bake grill fry buy sell board load unload sweep wipe scrub film lift pick take put get have give
do try perform touch follow surround cover contain enjoy share practice approach blow stop turn
bend tie shave type text dig guard row paddle dry return taste gather cuddle scratch climb peek
roam wander dine wade wrestle milk herd coach examine swat fill seat face pass include feature
squat pitch travel stick overlook crouch"""
# "kind of thing: what can be done to it"
DONE_TO = """
animal: feed wash pet chase ride hug carry brush milk photograph; person: hug chase push carry
kiss photograph lift follow; vehicle: wash push repair paint ride drive; gear.board: hold carry
throw kick wash repair paint break; gear.ball: hold throw carry kick catch wash; gear: hold throw
carry wash repair paint break; food: eat cut throw wash cook drop; drink: drink pour spill throw;
clothing: wear wash fold iron sew tear; device: hold use repair throw wash paint; fixture: clean
paint repair break; furniture: carry paint clean push repair break; container: hold wash carry
break throw paint; tool: hold carry throw wash drop break; home.read: read tear burn throw fold;
home: carry wash throw paint; feat: watch film; structure: paint climb photograph clean;
place.road: clean paint sweep photograph; place: photograph leave paint; sport: watch play coach;
nature: cut paint carry photograph; picture: paint draw hold; body: paint wash scratch; any: wash
paint throw drop"""
# "who is no person: what they can do to a thing"
DOES = """
animal: chase kick eat carry break push lick sniff drop hold catch; vehicle: push pull follow
carry hit"""
# Acts of one group can go together, so that one never replaces another.
TOGETHER = """
hold carry lift take use eat drink wear read show swing fly cut catch grab pick have get display;
hold throw toss serve hit return swing catch; hold pet hug feed brush peel drop kiss lead
photograph fold sniff touch cuddle push pull row; carry wear hug ride use push pull lead row
paddle fly put load; ride drive use board wear surf lead race sail enjoy row paddle do perform
balance; cook make prepare cut serve eat chop bake peel fry grill slice hold get enjoy share; eat
drink taste bite chew lick sniff enjoy share feed take touch; wash clean brush scrub wipe dry
sweep; push pull move lead hit kick tow; kick hit throw toss catch chase play serve swing swat
return drop use; feed pet hug kiss watch touch lick follow; chase herd follow lead watch; use
repair fix paint type text cut fly read; pour drink serve fill spill; wear have put use show
display try take get; play use practice enjoy; photograph watch film face show pass cross leave
approach enjoy enter; climb cross enter leave pass; paint draw make; break cut slice; lie lay
sleep rest relax nap lounge lean; sit relax rest pose wait lounge perch balance lean eat play;
stand wait pose lean balance perch; kneel crouch squat bend; walk stroll go move head come march
roam wander travel crawl; run jog race move go come jump leap hop; ski snowboard skateboard skate
surf ride slide glide roll; fly jump leap glide fall; move spin roll drive travel go come head
cruise race hop; graze eat feed; hang fall float balance; smile laugh wave"""
# "subject: acts > acts that may follow", all without an object.
FREE = f"""
person: {POSTURE} > sit stand lie kneel sleep dance crawl; animal: {POSTURE} > sit stand lie
sleep run jump; vehicle: {POSTURE} > burn move spin; thing: {POSTURE} hang balance > burn fall
spin float; person: {MOVING} {ROLLING} ride slide > walk run crawl dance roll; animal: {MOVING}
{ROLLING} roam wander > walk run crawl roll; vehicle: {ROLLING} pass float sail glide > crash
spin; person: fly soar glide float > crawl swim walk; animal: fly soar glide hover > walk swim
sleep; vehicle: fly soar glide hover > burn explode fall; thing: fly soar hover > burn fall;
person: eat feed drink dine > sleep dance crawl; animal: graze eat feed drink > sleep run jump
fight; person: smile laugh > cry yell; person: look stare gaze > sleep dance; animal: look stare
gaze peek > sleep run; person: play practice > sleep cry; animal: play fight > sleep eat; person:
swim wade work > sleep dance run; animal: swim wade > sleep run fly"""
ANY_ACT = {"person": ("sleep", "dance", "crawl"), "animal": ("sleep", "run", "jump")}
# "acts preposition > acts that take it too"
WITH_PREPOSITION = """
look stare gaze watch at > point yell laugh wave; smile laugh at > cry yell frown point; smile
for > cry yell; pull drive into > crash; chew on > sit step; hold onto > jump climb fall; pose
for > search dance cry; wait for > search reach; reach for > yell wave dance; search look for >
wait cry; talk speak chat text type on > step sit stand draw; talk speak chat to > wave point
bow; talk speak chat with > dance wrestle sing; swing at > point wave yell; look stare gaze out >
climb jump fall; look stare gaze peek into > fall climb jump; look stare gaze over > jump climb;
play with > sleep wrestle sit; jump leap over > crawl fly walk; ride on > stand sleep kneel
dance; ride in > sleep dance kneel"""
PARTICIPLES = """
parked: burning, moving, speeding; stopped: moving, burning; docked: sinking, burning; seated:
standing, kneeling, sleeping; gathered, crowded, huddled: dancing, fighting; smiling: crying,
frowning; sleeping, curled: running, jumping; crying: smiling; perched: sleeping, running;
placed, stacked, arranged, displayed, served, mounted, posted, piled: burning, spinning; shown,
seen, pictured: hidden; located, anchored, chained, propped, planted, stored: burning, spinning;
eaten, prepared: thrown, burned; held, carried: thrown, dropped; pulled: pushed, chased; topped
with, covered with, covered in, loaded with, filled with: emptied of, cleared of; decorated with,
lined with: stripped of, cleared of"""

# Relations.  "relations: kinds of thing after it = what contradicts it | ...", no kinds: any thing.
RELATIONS = """
on: furniture.top = under, next to | furniture vehicle animal gear.board = under, behind, next to
| container fixture home.soft home.read food = under, next to | nature structure = under, far
from | home.wall home.light place = far from | it = under, next to; in: it = next to, outside |
sport.event = far from | place.room place.shop place.venue structure.house = outside | place =
far from | container fixture furniture vehicle device = under, behind, next to | clothing =
without; on top of: under, next to; underneath, under, beneath: on top of; over, atop: under;
above: below; below: above; inside: place.room place.shop place.venue structure.house = outside |
= outside, under; outside: inside; in front of: behind; behind: in front of; next to, beside,
near, close to, by: far away from; at: furniture.top = under, far from | place structure
sport.event fixture = far from; around, surrounded by, between: far from; along, through: place =
far from; down: place.road = across | place.ground = up; up: place.ground = down; on top:
underneath; from: container furniture home.light structure nature = far from, next to; across:
place.road = along | place = far from; into: place vehicle structure container fixture = out of;
out of: place vehicle structure = into; towards, toward, against, up to: away from; away from:
towards; with: without; without: with; to the left of: to the right of; to the right of: to the
left of; on the side of, on the edge of: in the middle of; in the middle of: on the edge of;
during: sport.event = before, after; in the distance, in the background: in the foreground; at
night: at noon; at the top of: at the bottom of; at the bottom of: at the top of; on the back of,
in the back of: next to, in front of; in the foreground: in the background; full of, filled with:
empty of; topped with, covered with, covered in, decorated with, lined with, loaded with: free
of; has: lacks; have: lack; containing: lacking; inside of: outside of; outside of: inside of;
outdoors: indoors; indoors: outdoors; in the sky, in the air: on the ground; through the air:
along the ground; on the ground: in the air; on the floor: on the ceiling; on the wall: on the
ceiling, on the floor; on display: in storage; attached to: detached from; side by side: far
apart; together: apart"""
SWAP_KINDS = (
    *MOVERS,
    "gear",
    "device",
    "furniture",
    "container",
    "tool",
    "food",
    "drink",
    "clothing",
    "home",
    "structure",
    "fixture",
    "nature",
)
AGREEMENT = {"is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has"}

# Words by tag, see Token; and words with a quirk.
FUNCTION_WORDS = """
D: a an the this these those some his her their its my our your each every another both all no
any; M: one nine ten twelve dozens hundreds; I: is are was were be been being am has have had can
will do did not it's there's that's could should would; E: ridden worn blown driven broken
written made shown seen held eaten taken used built tied thrown drawn flown laid kept caught
hung; P: of to from for after before as like off than past thru onto upon during within including
consisting featuring missing via among amongst about; C: as and or but while when because if
that's so & where then; Q: he she it they we you i him them me us someone somebody who which that
what himself herself itself themselves there everyone another's one's others; R: very just also
not away together alone outdoors indoors here too down up out about ahead almost still only
nearly partially sideways upside else over back well"""
WORD_SETS = """
plural only: scissors, pants, shorts, pajamas, overalls, glasses, sunglasses, headphones,
earrings, electronics, supplies, clothes, traffic, eyeglasses, luggage, cattle, silverware,
clothing, stairs; doubled: sit, run, jog, swim, cut, hit, pet, hug, stop, put, get, nap, hop,
spin, swat, grab, dig, step, squat; lonely: outside, inside, together, outdoors, indoors, side by
side, on top, on display, in the sky, in the air, through the air, on the ground, on the floor,
on the wall, in the background, in the foreground, in the distance, at night; lacking: with, has,
have, containing, filled with, topped with, covered with, covered in, decorated with, lined with,
loaded with; possessive: his, her, its, their, my, our, your; not lacked: his, her, its, their,
my, our, your, lots, dozens, different, lot, variety, more, multiple, just, assorted, many,
several, some, few, various, other, no, both, all, each, every; swapping: on, under, behind,
above, over, below, on top of, in front of; names: red sox, little league; links: that, who,
which, while; symmetric: play, kiss, hug, touch, face, fight, meet, share, enjoy, have, do, make,
get, be, look, show; states: hold, contain, show, include, cover, surround, feature, have, use,
make, carry; busy: try, get, prepare, attempt, use, go, come; persons: who, he, she, someone,
they; particles: up, down, out, off; ages: young, little, small, teenage, old, older, elderly,
younger, baby; after acts: on, in, next to, near, in front of, at, by, behind, under, beside,
with, while, on top of, outside, inside, ., together, between, around; fixed on: talk, work,
speak, chat, display, put; fixed in: fenced, closed, dressed, covered, wrapped; fixed at: look,
stare, gaze, point, yell, laugh, wave, swing, throw; fixed together: play; fixed over: all, look;
fixed into: look, cut, turn, made; fixed out of: made, make; near few: many; near red: orange,
pink; near orange: red, yellow, brown; near pink: red, purple; near purple: pink, blue; near
brown: orange; near tan: white, yellow; near white: gray; near gray: white, black; near silver:
white, black; near grey: white, black; near yellow: orange; near blue: purple; never in: beach,
cliff, hill, rooftop, runway, pier, bridge, sidewalk, motorcycle, scooter, bicycle, bench, couch,
stool, skateboard, surfboard, snowboard, table, desk, farm, harbor, road, river, plate, tray,
napkin, cutting board, driveway, railroad track, dresser, nightstand, zoo; never on: forest,
desert, garden, valley, swamp, castle, church, village, city, office, hallway, kitchen, bathroom,
bedroom, restaurant, store, bakery, museum, library, hospital, park, market, lake, pond, ocean"""


class DataError(ValueError):
    """A mistake in a user's file; the message names the place and how to mend it."""


# Making negatives


def make_negatives(
    caption: str,
    *,
    seed: int = 0,
    key: str | int = "",
    types: Sequence[str] = NEGATIVE_TYPES,
    forbidden: frozenset[str] = frozenset(),
) -> dict[str, str | None]:
    """Rewrite one caption into a hard negative of each type.

    The result depends on the arguments alone, never on the order of calls or the process.

    Args:
        caption: one English sentence; anything else is allowed and gives nulls.
        seed: another seed, other choices.
        key: tells equal captions apart, such as the id of the image.
        types: which of ``NEGATIVE_TYPES`` to make.
        forbidden: lower-case words that no negative may bring in, such as the words of the other
            captions of the image, which may well be true of it.

    Returns:
        For each type, in the order of ``NEGATIVE_TYPES``, a sentence or None.  No sentence equals
        the caption (without regard to case and spaces) or another of the four.

    Raises:
        ValueError: a type is unknown.
    """
    unknown = sorted(set(types) - set(NEGATIVE_TYPES))
    if unknown:
        raise ValueError(f"unknown negative type {unknown[0]!r}; known are {NEGATIVE_TYPES}")
    negatives: dict[str, str | None] = {name: None for name in NEGATIVE_TYPES if name in types}
    sentence = _read(caption, forbidden)
    if sentence is None:
        return negatives
    seen = {_plain(caption)}
    for name in negatives:
        start = f"{seed}:{key}:{name}:{caption}".encode("utf-8", "surrogatepass")
        edits = EDITORS[name](sentence, random.Random(start))
        negative = _apply(caption, edits or [])
        if _plain(negative) not in seen:
            seen.add(_plain(negative))
            negatives[name] = negative
    return negatives


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# Reading the tables


class Sense(NamedTuple):
    """One meaning of a word, and what may stand in its place."""

    kind: str
    mass: bool
    choices: tuple[tuple[str, frozenset[str]], ...]  # (word, its synonyms)


def _entries(table: str, mark: str = ":") -> Iterator[tuple[str, str]]:
    for entry in " ".join(table.split()).split(";"):
        left, _, right = entry.partition(mark)
        yield left.strip(), right.strip()


def _items(text: str, mark: str = ",") -> list[str]:
    return [item.strip() for item in text.split(mark)]


def _rows(table: str) -> Iterator[tuple[str, str]]:
    """Name and group of every group in lines "name: group; group"; indented lines go on."""
    for line in table.strip().replace("\n  ", " ").splitlines():
        name, _, groups = line.partition(":")
        yield from ((name, group) for group in groups.split(";"))


def _read_things() -> dict[str, list[Sense]]:
    """Senses of every noun that can be replaced."""
    things: dict[str, list[Sense]] = defaultdict(list)
    for name, group in _rows(THINGS):
        source, _, target = group.partition(">")
        poles = [_items(pole, "/") for pole in _items(source)]
        pairs = [(p[0], frozenset(w.lstrip("~") for w in p)) for p in poles]
        offered = [(w, frozenset([w])) for w in _items(target) if w]
        offered = offered or [pair for pair in pairs if pair[0][0] != "~"]
        for _, pole in pairs:
            choices = tuple(o for o in offered if not o[1] & pole)
            for word in pole if choices else ():
                things[word].append(Sense(name.rstrip("*"), name.endswith("*"), choices))
    return dict(things)


def _read_values() -> dict[str, list[Sense]]:
    """Senses of every adjective that can be replaced; the kind is that of its noun."""
    values: dict[str, list[Sense]] = defaultdict(list)
    for name, group in _rows(VALUES):
        poles = [pole.split() for pole in group.split("|")]
        for pole in poles:
            others = tuple((p[0], frozenset(p)) for p in poles if p is not pole)
            for word in pole:
                values[word].append(Sense(name.partition("@")[2], False, others))
    return dict(values)


def _read_relations() -> dict[str, list[tuple[list[str], list[str]]]]:
    """For each relation rows of the kinds that may follow it and of what contradicts it."""
    relations = {}
    for names, groups in _entries(RELATIONS):
        rows = [group.rpartition("=") for group in groups.split("|")]
        for name in _items(names):
            relations[name] = [(kinds.split(), _items(targets)) for kinds, _, targets in rows]
    return relations


def _plural(noun: str) -> str:
    """Plural of a noun; the last word of a compound carries it."""
    if noun in SETS["plural only"]:
        return noun
    head, _, last = noun.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif re.search(r"([sxz]|ch|sh|[tg]o)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last = last[:-3] + "men" if last.endswith("man") else last + "s"
    return f"{head} {last}".strip()


def _inflect(verb: str, form: str) -> str:
    """Form G (riding), Z (rides) or B (ride) of a verb."""
    if form == "G" and verb in SETS["doubled"]:
        return verb + verb[-1] + "ing"
    if form == "G":
        return re.sub(r"(?<=[^eo])e$", "", re.sub(r"ie$", "y", verb)) + "ing"
    if form == "Z" and re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    if form == "Z":
        return verb + ("es" if re.search(r"([sxzo]|ch|sh)$", verb) else "s")
    return verb


SETS = {name: frozenset(_items(words)) for name, words in _entries(WORD_SETS)}
IRREGULAR_PLURALS = dict(pair.split(":") for pair in PLURALS.split())
SENSES, VALUE_SENSES, RELATION_ROWS = _read_things(), _read_values(), _read_relations()
DONE = {kind: acts.split() for kind, acts in _entries(DONE_TO)}
DONE_BY = {subject: acts.split() for subject, acts in _entries(DOES)}
FREE_ACTS = [
    (who, frozenset(acts.split(">")[0].split()), acts.split(">")[1].split())
    for who, acts in _entries(FREE)
]
PREPOSITIONAL_ACTS = {
    (act, left.split()[-1]): right.split()
    for left, right in _entries(WITH_PREPOSITION, ">")
    for act in left.split()[:-1]
}
PARTICIPLE_ACTS = {w: _items(acts) for ws, acts in _entries(PARTICIPLES) for w in _items(ws)}
PARTNERS = {  # numbers of the groups that an act stands in
    act: {n for n, group in enumerate(TOGETHER.split(";")) if act in group.split()}
    for act in TOGETHER.replace(";", " ").split()
}
POSTURES, MOVES = set(POSTURE.split()), {*MOVING.split(), *ROLLING.split(), "fly", "ride", "slide"}
KINDS = {word: kind for kind, words in _entries(OTHER_THINGS) for word in words.split()}
KINDS |= dict.fromkeys(SETS["names"], "idea")
KINDS |= {word: senses[0].kind for word, senses in SENSES.items() if word not in KINDS}
NOUN_FORMS = {_plural(word): (word, "S") for word in KINDS}
NOUN_FORMS |= {word: (word, "N") for word in KINDS if word not in SETS["plural only"]}
VERB_FORMS = {_inflect(verb, form): (verb, form) for verb in ACTS.split() for form in "BZG"}
VALUE_WORDS = {*VALUE_SENSES, *NUMBERS, *YOUNGER}
ADJECTIVES = {*VALUE_SENSES, *YOUNGER, *OTHER_VALUES.split()}
FUNCTION = {word: tag for tag, words in _entries(FUNCTION_WORDS) for word in words.split()}
FUNCTION |= dict.fromkeys(RELATION_ROWS, "P") | dict.fromkeys(NUMBERS, "M")
COMPOUNDS: dict[str, list[list[str]]] = defaultdict(list)  # by first word, the longest first
for _name in sorted({*NOUN_FORMS, *FUNCTION}, key=lambda name: (-len(name), name)):
    if " " in _name:
        COMPOUNDS[_name.split()[0]].append(_name.split())


# Reading a caption


class Token(NamedTuple):
    """A word of the caption: lower-cased text, offsets, tag and dictionary form.

    Tags: D determiner, M number, A adjective, N S noun in singular and plural, X unknown noun,
    G Z B riding, rides, ride, U unknown -ing, E participle, I auxiliary, P preposition,
    C conjunction, Q pronoun, R adverb and "." for a mark.
    """

    word: str
    start: int
    end: int
    tag: str
    lemma: str


class Phrase(NamedTuple):
    """A noun phrase: token indices of its first word, past its last word, and of its head."""

    first: int
    stop: int
    head: int


class Sentence(NamedTuple):
    """A caption that has been read; ``named`` are the words that no negative may bring in."""

    caption: str
    tokens: list[Token]
    phrases: list[Phrase]
    starts: dict[int, Phrase]  # phrases by first token
    named: frozenset[str]


Edit = tuple[int, int, str]  # start, end, new text
WORD = re.compile("[^\\W_]+(?:['\u2019-][^\\W_]+)*|[^\\w\\s]|_")


def _read(caption: str, forbidden: frozenset[str]) -> Sentence | None:
    """Tag and chunk a caption; None if it is not English."""
    words = _split(caption)
    tokens: list[Token] = []
    for i, (word, start, end) in enumerate(words):
        following = words[i + 1][0] if i + 1 < len(words) else ""
        tag, lemma = _tag(word, tokens[-1] if tokens else None, following)
        tokens.append(Token(word, start, end, tag, lemma))
    spoken = [t.tag for t in tokens if t.tag != "."]
    if 2 * sum(tag not in "XUE" for tag in spoken) <= len(spoken):
        return None
    phrases = _chunk(tokens)
    named = {t.word for t in tokens} | {t.lemma for t in tokens} | forbidden
    named |= {form[w][0] for form in (NOUN_FORMS, VERB_FORMS) for w in forbidden if w in form}
    return Sentence(caption, tokens, phrases, {p.first: p for p in phrases}, frozenset(named))


def _split(caption: str) -> list[tuple[str, int, int]]:
    """Words and marks with their offsets; a compound of the tables is one word."""
    found = itertools.islice(WORD.finditer(caption), MAX_WORDS)
    marks = [(m.group().lower(), m.start(), m.end()) for m in found]
    words, i = [], 0
    while i < len(marks):
        size = 1
        for name in COMPOUNDS.get(marks[i][0], ()):
            run = marks[i : i + len(name)]
            if [w for w, _, _ in run] == name and run[-1][2] - run[0][1] == len(" ".join(name)):
                size = len(name)
                break
        last = marks[i + size - 1]
        words.append((" ".join(w for w, _, _ in marks[i : i + size]), marks[i][1], last[2]))
        i += size
    return words


def _tag(word: str, previous: Token | None, following: str) -> tuple[str, str]:
    """Part of speech and dictionary form of a word between its neighbours."""
    if word in FUNCTION:
        return FUNCTION[word], word
    before = previous.tag if previous else ""
    nounish = following in NOUN_FORMS or following in ADJECTIVES
    if word in PARTICIPLE_ACTS and not nounish:
        return "E", word
    if word in ADJECTIVES and (
        nounish or (word not in NOUN_FORMS and (word not in VERB_FORMS or before == "I"))
    ):
        return "A", word
    if word in VERB_FORMS and _acts_here(word, previous, following, nounish):
        return VERB_FORMS[word][::-1]
    if word in NOUN_FORMS:
        return NOUN_FORMS[word][::-1]
    if word in VERB_FORMS and VERB_FORMS[word][1] == "G":
        return "A", word  # a smiling man
    return _guess(word, before), word


def _acts_here(word: str, previous: Token | None, following: str, nounish: bool) -> bool:
    """Whether a word that can be a verb is one here."""
    lemma, form = VERB_FORMS[word]
    before = previous.tag if previous else ""
    if form == "G" and word in NOUN_FORMS:
        return before in ("N", "S") and FUNCTION.get(following) == "D"
    if form == "G":
        modifies = before in ("D", "M", "A") or (
            previous and previous.word in ("with", "of", "for")
        )
        return not (modifies and nounish)
    if before in ("Q", "I") or (previous and previous.word == "to"):
        return form == "B" or before == "Q"
    if word not in NOUN_FORMS:
        return before in ("N", "S", "X", "R", "C", "E")
    if form == "Z" and lemma not in SENSES and following in SETS["after acts"]:
        return before in ("N", "X")
    moves = previous is not None and _matches(KINDS.get(previous.lemma, ""), MOVERS)
    return moves and before == ("S" if form == "B" else "N")


def _guess(word: str, before: str) -> str:
    """Tag of an unknown word from its ending."""
    if not word[0].isalnum():
        return "."
    if word.endswith(("'s", "\u2019s")):
        return "A"
    if word.isdigit():
        return "M"
    if word.endswith("ing") and len(word) > 5:
        return {"D": "A", "A": "A", "N": "G", "S": "G", "X": "G", "I": "G"}.get(before, "U")
    if word.endswith("ed") and len(word) > 4:
        return "A" if before in ("D", "A", "M") else "E"
    return "R" if word.endswith("ly") else "X"


def _chunk(tokens: list[Token]) -> list[Phrase]:
    """Noun phrases from left to right: determiners, modifiers, nouns."""
    text = "".join(
        "&" if t.word in ("and", ",") else "-" if t.tag not in "DMANSXR" else t.tag for t in tokens
    )
    found = re.finditer(
        r"[DM]*(?:(?:(?<=[DMA])R+(?=A))?[AX]|(?<=A)&+(?=A))*(?:[NS][NSX]*|(?<=X))", text
    )
    return [Phrase(m.start(), m.end(), m.end() - 1) for m in found if m.group()]


# Four editors: each proposes one edit, or none


def _relation(sentence: Sentence, rng: random.Random) -> list[Edit] | None:
    """Turn a relation into what contradicts it, or let its two sides change places."""
    swaps = _swaps(sentence)
    if swaps and rng.random() < SWAP_SHARE:
        return rng.choice(swaps)
    sites = [i for i, t in enumerate(sentence.tokens) if t.word in RELATION_ROWS]
    for i in _shuffled(sites, rng):
        targets = _contradictions(sentence, i)
        if targets:
            return _replace(sentence, i, i, rng.choice(targets))
    return rng.choice(swaps) if swaps else None


def _contradictions(sentence: Sentence, i: int) -> list[str]:
    """What contradicts relation i, as far as its neighbours allow."""
    relation, following = sentence.tokens[i].word, _word(sentence, i + 1)
    phrase = sentence.starts.get(i + 1)
    kind = "it" if following in ("it", "them") else _kind(sentence, phrase)
    lacking = relation in SETS["lacking"]
    if not _may_turn(sentence.tokens, i) or (lacking and not _can_lack(sentence, phrase)):
        return []
    thing = phrase is not None and (lacking or kind not in ("idea", "picture", "feat"))
    fits = thing or relation in SETS["lonely"] or following in ("each", "it", "him", "her", "them")
    for kinds, targets in RELATION_ROWS[relation]:
        if _matches(kind, kinds) or (fits and not kinds):
            return [t for t in targets if t not in sentence.named]
    return []


def _may_turn(tokens: list[Token], i: int) -> bool:
    """Whether a relation is free, and no part of an idiom."""
    if i == 0:
        return True
    before, relation = tokens[i - 1], tokens[i].word
    if before.lemma in SETS.get(f"fixed {relation}", ()) or before.tag == "D":
        return False
    if relation == "by" and any(t.tag == "E" for t in tokens[:i]):
        return False  # ridden by a man
    if relation == "from":
        return before.tag == "G"
    if relation in ("with", "by", "without", "between"):
        return before.tag in "NSX" or before.lemma in POSTURES
    return before.tag != "P" or before.word in ("around", "down", "up", "over", "outside", "off")


def _can_lack(sentence: Sentence, phrase: Phrase | None) -> bool:
    """Whether "without" and the like can stand before a phrase."""
    first = sentence.tokens[phrase.first] if phrase else None
    return first is not None and first.tag != "M" and first.word not in SETS["not lacked"]


def _swaps(sentence: Sentence) -> list[list[Edit]]:
    """Every way to let a subject and what it acts on or stands on change places."""
    whole: list[Phrase] = []  # "a group of men" is one, "a picture of a man" two
    for phrase in sentence.phrases:
        last = whole[-1] if whole else phrase
        shown = KINDS.get(sentence.tokens[last.head].lemma) == "picture"
        if last.stop + 1 == phrase.first and _word(sentence, last.stop) == "of" and not shown:
            whole[-1] = Phrase(last.first, phrase.stop, last.head)
        else:
            whole.append(phrase)
    found = []
    for k, one in enumerate(whole):
        before = sentence.tokens[one.first - 1] if one.first else None
        if before is None or before.word in SETS["links"] | {".", "of"} or before.tag == "I":
            for two in whole[k + 1 : k + 3]:
                if _asymmetric(sentence, one, two):
                    found.append(_swap(sentence, one, two))
    return [edits for edits in found if edits]


def _asymmetric(sentence: Sentence, one: Phrase, two: Phrase) -> bool:
    """Whether the words between two phrases make a sentence false once these change places."""
    tokens = sentence.tokens
    middle = tokens[one.stop : two.first]
    if not 0 < len(middle) <= 9:
        return False
    if any(t.tag in "CQ." and t.word not in SETS["links"] for t in middle):
        return False  # never across "and"
    for phrase in (one, two):
        kind = _kind(sentence, phrase)
        acted_on = phrase is two and middle[-1].tag in "GZB" and tokens[two.first].tag in "DM"
        if not (_matches(kind, SWAP_KINDS) or (acted_on and not kind)):
            return False
        if tokens[phrase.first].word in SETS["possessive"]:
            return False
    last, lead = middle[-1], middle[:-1]
    if last.tag in "GZB":
        free = not lead or lead[0].tag in "IPQGEC"
        return free and last.lemma not in SETS["symmetric"] | POSTURES
    return last.word in SETS["swapping"] and all(
        t.tag == "I" or (t.tag in "GZB" and t.lemma in POSTURES) for t in lead
    )


def _swap(sentence: Sentence, one: Phrase, two: Phrase) -> list[Edit]:
    """Let two phrases change places; the verb after the first agrees with its new subject."""
    caption, tokens = sentence.caption, sentence.tokens
    spans = [(tokens[p.first].start, tokens[p.stop - 1].end) for p in (one, two)]
    first, second = (caption[start:end] for start, end in spans)
    numbers = [
        "" if KINDS.get(tokens[p.head].lemma) in HOLDERS[:2] else tokens[p.head].tag
        for p in (one, two)
    ]
    verb = tokens[one.stop + (tokens[one.stop].tag == "Q")]
    edits = []
    if not all(numbers) or numbers[0] != numbers[1]:
        if one.first and tokens[one.first - 1].tag == "I":
            return []  # there is a man ...
        if verb.tag in "IZB":
            form = AGREEMENT.get(verb.word, "")
            if verb.tag != "I":
                form = _inflect(verb.lemma, "B" if verb.tag == "Z" else "Z")
            if not all(numbers) or not form:
                return []
            edits.append((verb.start, verb.end, form))
    if first[0].isupper() and not first.isupper() and tokens[one.first].tag != "X":
        first, second = first[0].lower() + first[1:], second[0].upper() + second[1:]
    return [(*spans[0], second), *edits, (*spans[1], first)]


def _attribute(sentence: Sentence, rng: random.Random) -> list[Edit] | None:
    """Give a thing another value of the same dimension."""
    tokens = sentence.tokens
    sites = [i for i, t in enumerate(tokens) if t.tag in "AM" and t.word in VALUE_WORDS]
    for i in _shuffled(sites, rng):
        targets = _values(sentence, i)
        if targets:
            return _replace(sentence, i, i, rng.choice(targets))
    return None


def _values(sentence: Sentence, i: int) -> list[str]:
    """Values that exclude that of token i."""
    tokens, word = sentence.tokens, sentence.tokens[i].word
    phrase = next((p for p in sentence.phrases if p.first <= i < p.stop), None)
    following = tokens[i + 1].tag if i + 1 < len(tokens) else ""
    if phrase is None and (tokens[i - 1].tag == "D" or word[-2:] + following == "edP"):
        return []  # in the wild, baked into a loaf
    head = tokens[phrase.head] if phrase else tokens[i]
    if word in NUMBERS:
        return [n for n in NUMBERS[:5] if n not in sentence.named] if head.tag == "S" else []
    if head.lemma in ("boy", "girl", "child", "kid") and word in YOUNGER:
        fits = head.lemma in ("boy", "girl") and YOUNGER[word] not in sentence.named
        return [YOUNGER[word]] if fits else []
    for sense in VALUE_SENSES.get(word, ()):
        if not sense.kind or _matches(_kind(sentence, phrase), sense.kind.split()):
            near = SETS.get(f"near {word}", ())
            return [w for w in _unnamed(sense, sentence) if w not in near]
    return []


def _object(sentence: Sentence, rng: random.Random) -> list[Edit] | None:
    """Name another thing of the same kind."""
    tokens = sentence.tokens
    for k in _shuffled(range(len(sentence.phrases)), rng):
        phrase = sentence.phrases[k]
        targets = _things(sentence, phrase)
        if targets:
            first = phrase.head
            while first > phrase.first and tokens[first - 1].tag == "N":
                first -= 1  # a kitchen counter becomes a table
            new = rng.choice(targets)
            if tokens[phrase.head].tag == "S":
                new = _plural(new)
            return _replace(sentence, first, phrase.head, new)
    return None


def _things(sentence: Sentence, phrase: Phrase) -> list[str]:
    """Things that can stand in the place of the head of a phrase."""
    noun, first = sentence.tokens[phrase.head], sentence.tokens[phrase.first].word
    measures = _word(sentence, phrase.head + 1) == "of" and KINDS.get(noun.lemma) in HOLDERS[:2]
    if noun.lemma not in SENSES or measures or first in ("another", "other"):
        return []
    counted = noun.tag == "S" or first in ("a", "an", "one", "each", "every")
    sense = min(SENSES[noun.lemma], key=lambda sense: sense.mass == counted)
    if first in ("some", "any", "much") and noun.tag == "N" and not sense.mass:
        return []
    sexes = {SEXES[t.word] for t in sentence.tokens if t.word in PRONOUNS}
    ages = {t.word for t in sentence.tokens[phrase.first : phrase.head]} & SETS["ages"]
    before = sentence.tokens[phrase.first - 1].word if phrase.first else ""
    return [
        word
        for word in _unnamed(sense, sentence)
        if word not in SETS.get(f"never {before}", ())
        and (noun.tag == "S" or word not in SETS["plural only"])
        and (word not in SEXES or not sexes or sexes == {SEXES[word]})
        and (word not in SEXES or not ages or (word in CHILDREN) == (noun.lemma in CHILDREN))
    ]


def _action(sentence: Sentence, rng: random.Random) -> list[Edit] | None:
    """Let the subject do something else that takes the same complement."""
    verbs = [i for i, t in enumerate(sentence.tokens) if t.tag in "GZBEP"]
    for i in _shuffled(verbs, rng):
        verb = sentence.tokens[i]
        if verb.word in PARTICIPLE_ACTS:
            return _replace(sentence, i, i, rng.choice(PARTICIPLE_ACTS[verb.word]))
        if verb.tag in "GZB":
            last, acts = _acts(sentence, i)
            groups = PARTNERS.get(verb.lemma, set())
            acts = [
                a for a in acts if a not in sentence.named and not groups & PARTNERS.get(a, set())
            ]
            if acts:
                return _replace(sentence, i, last, _inflect(rng.choice(acts), verb.tag))
    return None


def _acts(sentence: Sentence, i: int) -> tuple[int, Sequence[str]]:
    """Acts that fit in the place of verb i, and the last token that they replace."""
    verb, following = sentence.tokens[i], _word(sentence, i + 1)
    if (verb.lemma, following) in PREPOSITIONAL_ACTS:
        return i, PREPOSITIONAL_ACTS[verb.lemma, following]
    subject = _subject(sentence, i)
    who = subject or "thing"
    free: Sequence[str] = next((n for w, old, n in FREE_ACTS if w == who and verb.lemma in old), ())
    if not free and following in SETS["after acts"] and verb.lemma not in SETS["busy"]:
        free = ANY_ACT.get(subject, ())
    particle = following in SETS["particles"] and (i + 2 not in sentence.starts or not free)
    last = i + (particle and verb.lemma not in MOVES)  # sitting down, holding up a sign
    phrase = sentence.starts.get(last + 1)
    if phrase is None:
        return last, () if following in ("to", "like") else free
    kind = _kind(sentence, phrase)
    lifeless = subject not in ("person", "animal") and verb.lemma in SETS["states"]
    nameless = not kind and sentence.tokens[phrase.first].tag not in "DM"
    if nameless or lifeless or verb.lemma in POSTURES or kind in ("idea", "part", "measure"):
        return last, ()
    acts = next(DONE[k] for k in (kind, kind.split(".")[0], "any") if k in DONE)
    return last, DONE_BY.get(subject, acts)


def _subject(sentence: Sentence, i: int) -> str:
    """Who does verb i: person, animal, vehicle or thing, "" for unknown."""
    before = [p for p in sentence.phrases if p.stop <= i]
    start = i
    while start and sentence.tokens[start - 1].tag not in "C.Q":
        start -= 1
    if not before or (start and sentence.tokens[start - 1].word in SETS["persons"]):
        return "person"
    inside = [p for p in before if p.first >= start]
    if inside and inside[-1].stop == i and not _matches(_kind(sentence, inside[0]), MOVERS[:2]):
        inside = inside[::-1]  # a kitchen with a man cooking
    for phrase in [*inside, *reversed(before)]:
        kind = _kind(sentence, phrase).split(".")[0]
        if kind not in ("picture", "part", "body", "idea"):
            return kind if kind in MOVERS or not kind else "thing"
    return ""


EDITORS = {"relation": _relation, "attribute": _attribute, "object": _object, "action": _action}


def _word(sentence: Sentence, i: int) -> str:
    return sentence.tokens[i].word if i < len(sentence.tokens) else "."


def _kind(sentence: Sentence, phrase: Phrase | None) -> str:
    """Kind of thing that a phrase names, "" if unknown; a group of dogs is an animal."""
    if phrase is None:
        return ""
    kind = KINDS.get(sentence.tokens[phrase.head].lemma, "")
    if kind in HOLDERS and _word(sentence, phrase.head + 1) == "of":
        return _kind(sentence, sentence.starts.get(phrase.head + 2)) or kind
    return kind


def _matches(kind: str, wanted: Iterable[str]) -> bool:
    """Whether a kind such as place.room is one of the wanted, which may be as wide as place."""
    return any(kind == w or kind.startswith(w + ".") for w in wanted)


def _unnamed(sense: Sense, sentence: Sentence) -> list[str]:
    return [word for word, same in sense.choices if not same & sentence.named]


def _shuffled(items: Iterable[int], rng: random.Random) -> list[int]:
    mixed = list(items)
    rng.shuffle(mixed)
    return mixed


# Writing an edit


def _replace(sentence: Sentence, first: int, last: int, new: str) -> list[Edit]:
    """Put new words in the place of tokens first..last, and mend the article before them."""
    caption, tokens = sentence.caption, sentence.tokens
    start, end = tokens[first].start, tokens[last].end
    edits = [(start, end, _cased(new, caption[start:end]))]
    before = tokens[first - 1] if first else None
    if before and before.word in ("a", "an"):
        vowel = re.match(r"(?!uni|use|util|euro|one\b)[aeiou]|hour|honest", new)
        old = caption[before.start : before.end]
        article = "an" if vowel else "a"
        if article != before.word:
            edits.append((before.start, before.end, _cased(article, old)))
    return edits


def _cased(new: str, old: str) -> str:
    """Capitals of the old text on the new."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[0].upper() + new[1:] if all(w[0].isupper() for w in old.split()) else new


def _apply(caption: str, edits: Iterable[Edit]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        caption = caption[:start] + new + caption[end:]
    return caption


# Reading captions


def read_captions(
    path: Path | str, *, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[dict[str, Any]]:
    """Read captions from any of the formats of the module's docstring.

    Args:
        path: a .jsonl, .json, .csv or .tsv file, or "-" for one caption a line on stdin.
        image_column: column of the images in a table; ``filepath`` or ``image`` if not given.
        caption_column: column of the captions; ``title`` or ``caption`` if not given.

    Yields:
        Records with the keys image (str or None), image_id (as found, or None) and caption (str).

    Raises:
        DataError: the file cannot be read, or a record is not what it should be.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    try:
        if str(path) == "-":
            yield from (_record(None, None, line.rstrip("\r\n"), "-") for line in sys.stdin)
        elif suffix == ".jsonl":
            yield from _read_manifest(path)
        elif suffix == ".json":
            yield from _read_json(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_table(path, image_column, caption_column)
        else:
            raise DataError(f"{path}: unknown kind of file; want .jsonl, .json, .csv, .tsv or -")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _record(image: Any, image_id: Any, caption: Any, place: str) -> dict[str, Any]:
    if not isinstance(caption, str):
        raise DataError(f"{place}: want a caption that is a string, got {str(caption)[:40]!r}")
    return {"image": image, "image_id": image_id, "caption": caption}


def _parse(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise DataError(f"{name}:{line}: not JSON ({error}); JSON lines are named .jsonl") from None


def _read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            row = _parse(line, path.name, number) if line.strip() else {"manifest": 1}
            if not isinstance(row, dict):
                raise DataError(f"{path.name}:{number}: want a JSON object, got {line[:40]!r}")
            if "manifest" not in row:
                place = f"{path.name}:{number}"
                yield _record(row.get("image"), row.get("image_id"), row.get("caption"), place)


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """A COCO captions file, or either layout of the Karpathy splits."""
    data = _parse(path.read_text(encoding="utf-8-sig"), path.name, 1)
    i = -1
    try:
        files = {}
        if isinstance(data, dict) and "annotations" in data:
            files = {image["id"]: image["file_name"] for image in data.get("images", ())}
        rows = data if isinstance(data, list) else data.get("annotations", data.get("images"))
        for i, row in enumerate(rows):
            image_id = row.get("image_id", row.get("cocoid", row.get("imgid")))
            if "sentences" in row:
                image = "/".join(filter(None, (row.get("filepath"), row["filename"])))
                captions = [sentence["raw"] for sentence in row["sentences"]]
            else:
                image = row.get("image", files.get(image_id))
                captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
            for caption in captions:
                yield _record(image, image_id, caption, f"{path.name}: record {i}")
    except (KeyError, TypeError, AttributeError) as error:
        place = f"{path.name}: record {i}" if i >= 0 else f"{path.name}:1"
        raise DataError(f"{place}: neither COCO nor Karpathy form ({error!r})") from None


def _read_table(path: Path, image: str | None, caption: str | None) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        delimiter = "\t" if "\t" in lines.readline() else ","
        lines.seek(0)
        table = csv.DictReader(lines, delimiter=delimiter)
        try:
            columns = table.fieldnames or []
            images = [c for c in ([image] if image else ["filepath", "image"]) if c in columns]
            texts = [c for c in ([caption] if caption else ["title", "caption"]) if c in columns]
            if columns and (not texts or (image and not images)):
                raise DataError(
                    f"{path.name}:1: columns are {', '.join(columns)}; "
                    "name yours with --image-column and --caption-column"
                )
            for row in table:
                place = f"{path.name}:{table.line_num}"
                yield _record(row[images[0]] if images else None, None, row[texts[0]], place)
        except csv.Error as error:
            raise DataError(f"{path.name}:{table.line_num}: not a table ({error})") from None


# The command


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the layout of __doc__ and print every default."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare every option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    add = parser.add_argument
    add("captions", nargs="?", metavar="CAPTIONS", help='a file, or "-" for stdin')
    add("--text", metavar="CAPTION", help="print the negatives of one caption")
    add("--out", type=Path, metavar="FILE.jsonl", help="the manifest to write")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add("--engine", choices=["lexicon"], default="lexicon", help="how to rewrite")
    add("--types", nargs="+", choices=NEGATIVE_TYPES, default=NEGATIVE_TYPES, help="to make")
    add("--seed", type=int, default=0, metavar="N", help="another seed, other choices")
    add("--workers", type=int, default=1, metavar="N", help="processes")
    add("--limit", type=int, metavar="N", help="read the first N captions only")
    add("--stats", action="store_true", help="print coverage and the reasons for nulls")
    add("--image-column", metavar="NAME", help="of a table")
    add("--caption-column", metavar="NAME", help="of a table")
    args = parser.parse_args(argv)
    if (args.captions is None) == (args.text is None):
        parser.error("want either CAPTIONS or --text")
    if args.captions is not None and args.out is None:
        parser.error("--out is missing: name the .jsonl file to write")
    if args.workers < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--workers and --limit must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write the negatives of a file, or print those of one caption."""
    args = parse_args(argv)
    types = tuple(name for name in NEGATIVE_TYPES if name in args.types)
    if args.text is not None:
        for name, negative in make_negatives(args.text, seed=args.seed, types=types).items():
            print(f"{name:<10}{negative or '-'}")
        return
    if args.out.exists() and not args.overwrite:
        raise DataError(f"--out {args.out} exists already; name another file or add --overwrite")
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    records = list(itertools.islice(read_captions(args.captions, **columns), args.limit))
    if not records:
        raise DataError(f"{args.captions}: no captions in it; is it the right file?")
    jobs = [(r, siblings, args.seed, types, args.stats) for r, siblings in _siblings(records)]
    fates = _write(args.out, jobs, Path(args.captions).name, args.workers)
    for name in types if args.stats else ():
        made = fates[name, ""]
        print(f"{name:<10}{made:>8} of {len(jobs)} ({made / len(jobs):.1%})")
        for (other, reason), count in sorted(fates.items()):
            if other == name and reason:
                print(f"{'':<10}{count:>8} null: {reason}")


Job = tuple[dict[str, Any], frozenset[str], int, tuple[str, ...], bool]


def _image_of(record: dict[str, Any]) -> str:
    image = record["image_id"] if record["image_id"] is not None else record["image"]
    return "" if image is None else str(image)


def _siblings(records: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """Each record with the words of its image's captions, which may be true of it as well."""
    words: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if _image_of(record):
            words[_image_of(record)].update(w for w, _, _ in _split(record["caption"]))
    frozen = {image: frozenset(found) for image, found in words.items()}
    for record in records:
        yield record, frozen.get(_image_of(record), frozenset())


def _work(job: Job) -> tuple[str, list[tuple[str, str]]]:
    """The line of one record, and of each type why it is null, "" if it is not."""
    record, siblings, seed, types, stats = job
    caption, key = record["caption"], _image_of(record)
    negatives = make_negatives(caption, seed=seed, key=key, types=types, forbidden=siblings)
    fates = [
        (name, "" if text else _reason(caption, name) if stats else "null")
        for name, text in negatives.items()
    ]
    line = json.dumps({**record, "negatives": negatives}, ensure_ascii=False)
    if re.search("[\ud800-\udfff]", line):  # half a character cannot be written as UTF-8
        line = json.dumps({**record, "negatives": negatives})
    return line + "\n", fates


def _reason(caption: str, name: str) -> str:
    sentence = _read(caption, frozenset())
    if sentence is None:
        return "not English"
    if EDITORS[name](sentence, random.Random(0)):
        return "the other captions of the image use the words that would do"
    return "no word that can be replaced"


def _write(out: Path, jobs: list[Job], source: str, workers: int) -> Counter[tuple[str, str]]:
    """Write header and records to a .partial file, then rename it; count the fates."""
    fates: Counter[tuple[str, str]] = Counter()
    seed, types = jobs[0][2:4]
    header = {"manifest": 1, "engine": "lexicon", "seed": seed, "types": types, "source": source}
    header |= {"captions": len(jobs), "negatives": dict.fromkeys(types, len(jobs))}
    partial = out.with_name(out.name + ".partial")
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(partial.open("w", encoding="utf-8", newline="\n"))
            stack.callback(partial.unlink, missing_ok=True)
            width = len(json.dumps(header))  # its counts are written over at the end
            file.write(" " * width + "\n")
            pool = stack.enter_context(Pool(workers)) if workers > 1 else None
            for line, fate in pool.imap(_work, jobs, CHUNK) if pool else map(_work, jobs):
                file.write(line)
                fates.update(fate)
            header["negatives"] = {name: fates[name, ""] for name in types}
            file.seek(0)
            file.write(json.dumps(header).ljust(width))
            file.close()
            os.replace(partial, out)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror}); check it") from None
    return fates


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"negatives.py: error: {error}", file=sys.stderr)
        sys.exit(2)
