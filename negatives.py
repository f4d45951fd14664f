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
edit is safe the negative is null.  All knowledge of words stands in the tables below.  Which edit
is made is drawn by how well it fits its place in the captions of the file (--filler ngram), so that
words come in about as often as they go out, and no odd word gives a negative away.

  python negatives.py captions.json --out negatives.jsonl --stats
  python negatives.py --text "A man riding a brown horse on the beach."

CAPTIONS is a manifest (.jsonl), a COCO or Karpathy .json, a .csv or .tsv with a header, or "-"
for lines on stdin.  The output has a header line, then one JSON record for each caption.  A run
that was stopped goes on where it was.  Webdataset shards (.tar) come out as shards in the folder
--out, with negatives in the .json of each sample; torchrun and SLURM ranks share them.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import contextlib
import csv
import difflib
import errno
import functools
import gc
import hashlib
import http.client
import io
import itertools
import json
import os
import queue
import random
import re
import socket
import sys
import tarfile
import threading
import time
import urllib.parse
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from math import exp, expm1, inf, log
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

__all__ = [
    "NEGATIVE_TYPES",
    "DataError",
    "Negative",
    "Slots",
    "edit_sentence",
    "learn_slots",
    "make_negatives",
    "read_captions",
]

NEGATIVE_TYPES = ("relation", "attribute", "object", "action")
MAX_WORDS = 60  # CLIP reads 77 subwords; an edit behind them would not be seen
MAX_CANDIDATES = 16  # of one type that are weighed; of more every second, third ... one

# Things.  "class.kind: a/b, c > d; ...": a and b mean the same, words before > become those after
# it, ~ marks a word that is never chosen, * a kind without plural.
THINGS = """
person.adult: man, guy, gentleman, male, dude, fellow > woman, girl; woman, lady, female > man,
  boy; boy > girl, woman; girl > boy, man
person.child: child, kid, toddler, infant, youngster > man, woman
person.baby: baby, newborn > dog, monkey, robot
person.any: person, human > dog, monkey, robot
person.group: couple, family, crowd, audience > orchestra, choir
person.young: teenager, teen, adult, youth, student, friend, tourist > toddler, soldier, clown
person.sport: surfer, skier, skateboarder/skater/~skate boarder, snowboarder/~snow boarder,
  cyclist/bicyclist/~biker/~bike rider, swimmer, motorcyclist, jogger/runner, boxer, horseback
  rider; rider, boarder, ~athlete > swimmer, boxer
person.player: tennis player, baseball player/~ball player/~batter/~pitcher/~catcher, soccer
  player, basketball player/~football player, golfer, hockey player; player, umpire, hitter,
  outfielder, referee > dancer, golfer, swimmer
person.work: police officer/policeman/officer/cop, firefighter/fireman, chef/cook, doctor,
  soldier, clown, waiter/waitress, farmer, cowboy, nurse, worker, driver, pilot, vendor, musician
person.kin: bride, groom, mother/mom, father/dad, grandmother, grandfather; pedestrian, passenger,
  spectator, customer, shopper > soldier, clown, firefighter
animal.pet: dog/puppy/~pup, cat/kitten/~kitty/~feline, rabbit/bunny, hamster
animal.farm: horse/pony, cow/~bull/~cattle/~ox/~calf/~steer, sheep/~lamb/~ram, goat, pig,
  donkey/mule, camel
animal.wild: elephant, giraffe, zebra, lion, tiger, rhino, deer, monkey, bear/~polar bear/~brown
  bear, kangaroo, wolf, fox
animal.any: animal > bird, robot
animal.bird: duck, goose, seagull/gull, pigeon, parrot, owl, swan, eagle, flamingo, penguin; bird
  > squirrel, lizard, monkey, rabbit
animal.other: squirrel, mouse, turtle, frog, lizard, snake
vehicle.road: car/sedan/taxi/~cab/jeep, truck/~pickup/~pickup truck/~lorry/fire truck, bus/~double
  decker bus/~double decker, van/minivan, train/~locomotive/~passenger train, tractor,
  motorcycle/motorbike/~motor bike, scooter/moped, bicycle, trolley/tram, ambulance, carriage,
  ~wagon; bike > horse, car, tractor; vehicle, traffic, automobile > boat, horse, airplane
vehicle.road: shopping cart/cart > sled, tractor
vehicle.air: airplane/plane/jet/~airliner/~jetliner/~aeroplane/~jumbo jet/~biplane, helicopter,
  ~hot air balloon; aircraft > helicopter, hot air balloon
vehicle.water: boat/ship/~ferry/~sailboat/~sail boat/~speedboat/~yacht > raft, airplane;
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
  football game, hockey game, card game; game, match, video game, wii, nintendo wii > concert, movie
device.hand: cell phone/phone/cellphone/telephone/smartphone/mobile phone/iphone/~smart phone,
  camera, radio, calculator, flashlight, game controller/remote/remote control/controller/~wii
  remote
device.desk: laptop/computer/laptop computer/~pc/~desktop/~desktop computer/~notebook/~computer
  monitor/monitor, television/tv/~television set/~flat screen tv, printer, typewriter, radio; screen
  > window, mirror; keyboard/~computer keyboard, ~computer mouse, speaker, lamp
device.kitchen: refrigerator/fridge/~freezer, oven/stove/~stove top, microwave/~microwave oven,
  toaster, dishwasher, washing machine, blender, coffee maker
fixture.bath: toilet/~toilet seat/~toilet bowl/commode, sink/~basin, bathtub/tub/~bath tub/~bath,
  ~shower, urinal; faucet, toilet paper, shower curtain > towel, soap dish
furniture.seat: couch/sofa/~loveseat, chair/armchair/recliner/~seat/~rocking chair/stool, bench
furniture.top: table/~table top/~dining table/~coffee table/~dining room table/~kitchen
  table/~tabletop/desk/~nightstand/counter/~countertop/~kitchen counter/~counter top, shelf,
  dresser; bookshelf/bookcase, cabinet/cupboard, wardrobe, drawer
furniture.top: rack > shelf, stool
furniture.bed: bed, crib, hammock, couch; mattress, bunk bed > couch, hammock
container.plate: plate/dish/platter/tray/~paper plate, bowl, napkin, cutting board/~chopping board
container.cup: cup/mug, ~coffee cup, glass/~wine glass, bottle/~wine bottle/~water bottle,
  vase/jar, pitcher, ~pot
container.pan: pan/~frying pan/skillet, wok, pot
container.box: box, basket, bucket, bag/suitcase/~luggage, crate, barrel
container.bin: container > basket, suitcase, bucket; trash can/garbage can/~trash bin, mailbox,
  cage
tool.eat: fork, knife, spoon, spatula, ladle, chopstick, whisk; utensil, silverware > screwdriver,
  pencil
tool.hand: toothbrush, comb, razor, pencil, pen, paintbrush, hairbrush; brush, scissors, tool >
  hammer, pencil; umbrella/parasol, flag, cane, fishing rod, broom, lantern; candle > lantern, light
  bulb
food.meal: pizza, sandwich/~sub/~panini, burger/hamburger/~cheeseburger, hot dog/hotdog/~corn dog,
  salad, taco, burrito, omelet/omelette, pancake, waffle; slice, meal, dinner, lunch, breakfast >
  burger, taco
food.sweet: ice cream > cake, salad; cake/~birthday cake/~chocolate cake/~wedding cake,
  donut/doughnut/~pastry, cookie, muffin, cupcake, pie, ice cream cone, brownie; dessert > burger,
  taco
food.bread: bun, bagel, croissant, pretzel
food.fruit: banana, apple, orange, lemon/lime, pear, peach, pineapple, strawberry, grape, mango,
  watermelon; fruit, berry, cherry, kiwi > onion, potato, cookie
food.veg: carrot, potato, onion, cucumber, tomato, mushroom, pepper, radish, pumpkin, pickle,
  olive; vegetable, veggie, bean, pea > cookie, strawberry
food.topping: pepperoni, topping, french fry, fry, chip, noodle, egg > strawberry, cookie
food.mass*: fruit > bread, soup, cheese; bread/~toast, rice, pasta/spaghetti/~macaroni,
  soup/~stew, cheese, chicken/~turkey, beef/steak/~meat, fish/~salmon/~tuna,
  bacon/ham/~pork/~sausage, cereal, ~pizza, ~cake, ~salad; food > wine, paint, laundry
food.green*: broccoli, lettuce/spinach, corn, cauliflower, cabbage, celery, asparagus
food.sauce*: ketchup, mustard, butter, cream, chocolate, honey, jam, mayonnaise; sauce, gravy,
  syrup, cheese sauce, sugar > snow, mustard
drink.mass*: wine/~red wine/~white wine, beer, coffee, tea, milk, juice/~orange juice, lemonade,
  ~soda; beverage, drink, alcohol, liquor > sandwich, cookie
clothing.top: jacket/coat/~hoodie, sweater > dress, robe, apron, kimono; shirt/~t-shirt/~tee
  shirt/~t shirt/~jersey > jacket, sweater, dress, robe, apron, kimono; dress, vest, robe/bathrobe,
  ~suit/~business suit/~tuxedo, apron, wetsuit/~wet suit, kimono; uniform, outfit, costume > kimono,
  robe, wetsuit
clothing.leg: pants/~trousers/~jeans, shorts/~swim trunks/~trunks, skirt, pajamas, overalls
clothing.head: hat/cap/~baseball cap/~baseball hat/~beanie/headband, helmet, crown, wig, scarf,
  turban
clothing.face: glasses/eyeglasses/~goggles, sunglasses, headphones, earrings
clothing.foot: shoe/sneaker > sock, glove; boot, sandal/~flip flop, sock, slipper
clothing.neck: tie/necktie/~neck tie/~bow tie/~bowtie, scarf, necklace, badge
clothing.hand: purse/handbag, backpack/~back pack/~pack, suitcase/~luggage/~briefcase, umbrella,
  guitar; bag > umbrella, guitar, box; mask, watch, collar, ribbon, leash > scarf, bell
home.soft: pillow/cushion, blanket/quilt/comforter/sheet/~bedspread, towel, curtain/~drape,
  rug/carpet/~mat, tablecloth
home.wall: door/doorway > gate, curtain; mirror, painting/~artwork, ~window, clock, poster,
  ~fireplace, ~bookcase; photograph, picture frame, vent, outlet, blind > mirror, clock; wall >
  fence, window, door
home.light: lamp/~light fixture, chandelier, ceiling fan, candle; floor, ceiling, tile, sill,
  window sill > wall, roof, door
home.toy: teddy bear/stuffed animal/~teddy/~stuffed bear/~stuffed toy, doll, robot, puppet; toy >
  balloon, candle; figurine, statue/sculpture > lamp, clock
home.read: book, newspaper, magazine, letter, map, envelope; paper, card, note, document > book,
  blanket; menu, notebook > book, newspaper
structure.house: house, church/cathedral, castle, skyscraper, barn, tent, lighthouse, hotel,
  factory, windmill; building, home, tower, steeple, shed, cabin, clock tower > bridge, tent
structure.pole: pole, post, column > tree, wall, ladder
structure.fence: fence/~railing/~rail/~chain link fence, hedge, gate, ladder, staircase/~stair;
  bridge, tunnel, archway; roof, balcony, porch, patio, deck > garden, staircase
structure.street: traffic light/~stop light/~stoplight/~traffic signal/~street light/~light, stop
  sign/~street sign/~sign/~traffic sign/~road sign, parking meter/~meter, fire hydrant/hydrant,
  mailbox, telephone booth, fountain, billboard, bench, flagpole; cone, curb, sculpture > mailbox,
  fountain; street lamp, telephone pole, lamp post > flagpole, fountain
structure.dock: pier/dock, bridge
place.road: street/~road/~roadway/~highway/~lane/~avenue/~freeway,
  path/~trail/~pathway/~sidewalk/~walkway/~pavement, driveway, railroad track/~track/~train
  track/~railway/~railroad, river; corner, street corner, intersection, crosswalk, crossing >
  bridge, beach, rooftop; parking lot/~lot, runway/~tarmac, bridge, rooftop
place.ground: beach/~shore/~seashore/~coast, field/~meadow/~pasture/~grassland/~lawn/~yard/~park,
  forest/~woods/~jungle, desert, garden, swamp, parking lot; park > beach, desert, parking lot,
  forest; hill/hillside/~ski slope/~slope/mountain/~mountain side/~mountainside, valley, beach,
  cliff
place.court: tennis court/~court, baseball field/~baseball diamond, golf course, soccer field,
  basketball court; skate park/~skateboard park/~ramp/~skateboard ramp, swimming pool/pool,
  stadium/~arena
place.cage: habitat, exhibit, resort, platform, backyard, alley, apartment, bay, shoreline, plain
  > desert, river; enclosure, pen, area > river, swimming pool
place.land*: grass, snow, sand/dirt, mud,gravel, concrete, ice; ground, hay > ice, sand
place.water: lake/pond/puddle, river/~stream, swimming pool/pool, fountain; ocean/sea, desert,
  forest
place.water*: water, surf > sand, snow, mud; rain > snow, fog
sky.any: cloud, rainbow, star > mountain, balloon
place.room: kitchen, bathroom/restroom/washroom/~rest room/~bath room, bedroom/~bed room, living
  room/~family room, dining room, office/~cubicle, garage, classroom, hallway, hotel room, waiting
  room, conference room; room > garden, barn
place.shop: restaurant/~cafe/~diner/store/shop/~grocery store/supermarket/bakery/~market, museum,
  library, hospital, barber shop
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
person.group: team; part: side top bottom back front edge end middle center part distance background
foreground left right rest half base tip point section step; body: head hand arm leg foot mouth face
hair neck ear eye tail nose tusk horn tongue tooth finger lap paw beard chest shoulder knee body;
feat: trick jump stunt flip swing pitch; idea: land sky air turn break way time day night afternoon
morning evening sunset winter summer wedding party event walk flight show parade race contest
competition motion action style position something thing stuff item object everything anything
nothing fun conversation smile reflection shade shadow shape colour color name number word letter
pattern life world display look stop bite catch hit serve decoration center equipment electronics
object light accessory appliance supplies ingredient condiment dining parking birthday christmas
police flat steel teddy size love sale sun graffiti power case cover lid hole sports engine wheel
wing propeller wire rope pipe frame tape net stall booth island vanity block straw neon design
furniture snack produce attire space weather direction construction; picture: picture photo
photograph image view shot selfie portrait painting drawing closeup scene close-up; measure: group
bunch pile stack row line pair herd flock variety assortment lot set piece collection array
selection series load bouquet bundle handful pack dozen loaf kind type sort number slice"""
# "kinds: what a caption of the image says > what of these kinds cannot be there then".
CLASHES = """
vehicle.water: float sail water lake river ocean sea dock harbor pier row > airplane;
animal.bird: fly perch nest wing > squirrel lizard monkey rabbit; animal.any: herd > bird robot;
clothing.top: suit tie tuxedo > dress robe kimono apron; place.water: wave surf > forest desert;
gear.ball: serve bat > frisbee disc boomerang kite balloon; gear.ball: fly > frisbee disc
boomerang beach_ball ball; person.any: hold wear point use talk read write type take > dog
monkey; food.mass: eat > wine paint laundry; device.kitchen: kitchen > refrigerator fridge oven
stove microwave; device.hand: picture photo selfie > camera; person.child: people > man woman"""
HOLDERS = ("measure", "person.group", "container.plate", "container.cup", "container.box")  # of ...
PLURALS = """child:children person:people foot:feet tooth:teeth mouse:mice goose:geese knife:knives
shelf:shelves leaf:leaves wolf:wolves calf:calves sheep:sheep deer:deer fish:fish scarf:scarves
loaf:loaves bookshelf:bookshelves half:halves photo:photos video:videos"""
SPORTS = ("person.player", "person.sport", "sport.event", "sport.game", "gear.board")
HANDLED = ("animal", "vehicle", "gear", "food", "device", "tool", "container")
COUNTED = (
    "animal",
    "person.child",
    "fixture.bath",
    "person.sport",
    "person.work",
    "vehicle",
    "gear",
    "device.desk",
    "food.meal",
    "food.sweet",
    "food.fruit",
    "home.toy",
    "structure.house",
    "furniture.seat",
    "structure.street",
    "device.kitchen",
    "container.box",
    "home.wall",
    "tool.hand",
)
MOVERS = ("person", "animal", "vehicle")
SEEN = ("person", "animal", "home", "clothing")
HOUSES = ("place.room", "place.shop", "structure.house")
SEXES = {"man": "M", "boy": "M", "woman": "F", "girl": "F"}
SEXES |= dict.fromkeys(("he", "his", "him", "himself"), "M")
SEXES |= dict.fromkeys(("she", "her", "hers", "herself"), "F")
CHILDREN = ("boy", "girl")
OTHER_AGE = {"man": "boy", "woman": "girl", "boy": "man", "girl": "woman"}
OTHER_SEX = {"man": "woman", "woman": "man", "boy": "girl", "girl": "boy", "he": "she", "she": "he"}
OTHER_SEX |= {"his": "her", "her": "his", "him": "her", "himself": "herself", "herself": "himself"}
PRONOUNS = set(SEXES) - {"man", "woman", *CHILDREN}

# Values.  Groups end with ;, in a group | parts what excludes each other, its first word is chosen.
# After @ stand the kinds of thing that the row is for.
VALUES = """
age@person animal: elderly old ~aging older ~aged | young younger
open@home device container structure.house structure.fence fixture furniture clothing tool food
  vehicle: open ~opened | closed shut
stood@person animal: standing | sitting lying; seated | standing; sleeping ~resting ~sleepy |
  running jumping playing; grazing | running sleeping
tame@animal: domestic ~tame | wild
heat@food drink place.water fixture: hot ~warm ~heated | cold icy ~chilly ~cool frozen
sharp@picture: blurry blurred | sharp
use@vehicle: passenger commuter subway | freight cargo
age: old antique vintage older ~aged old-fashioned | new modern ~brand-new
any: many numerous | few ; red ~crimson maroon ~burgundy | blue ~navy turquoise teal | green |
  yellow ~golden gold | orange | purple ~violet ~lavender | pink | black ~dark-colored | white beige
  ~cream ~ivory | brown tan | gray grey silver; colorful multicolored multi-colored colored ~vibrant
  | ~colorless black-and-white plain ; large big huge giant enormous ~gigantic massive ~oversized
  ~jumbo | small little tiny miniature ~mini; tall ~towering | short; long ~lengthy | short; wide
  ~broad | narrow ~skinny thin; wooden wood | metal steel ~metallic ~iron ~aluminum | plastic |
  glass | stone concrete ~cement | brick | leather; grassy ~grass-covered ~lush | sandy | snowy
  snow-covered | muddy dirt | rocky gravel | paved ~asphalt; sunny clear | rainy stormy | cloudy
  overcast ~cloud-filled | foggy misty ~hazy; striped | checkered plaid | ~spotted ~dotted polka-dot
  | floral ~flowered ~flowery | plain; wet ~soaked ~damp | dry; bright ~brightly-lit ~well-lit
  ~sunlit | dark dim ~dimly-lit ~darkened; clean tidy ~neat | dirty messy ~filthy cluttered ~grimy;
  empty vacant ~bare | full crowded ~packed ~filled; busy bustling crowded | quiet empty deserted ;
  sliced cut ~chopped | whole uncut; round circular | square rectangular; heavy thick | thin; happy
  smiling ~cheerful ~joyful ~laughing | sad angry crying ~frowning; shirtless | fully-clothed; fresh
  ripe | rotten moldy; parked ~stationary stopped | moving speeding; left | right; male | female;
  curly ~wavy | straight; fluffy furry shaggy hairy ~fuzzy ~woolly | hairless ; deep | shallow;
  steep | flat; cooked baked grilled roasted ~toasted fried | raw uncooked; indoor | outdoor; rural
  country | urban; fancy ornate elegant ~elaborate decorative | simple plain; broken damaged |
  intact; rusty ~rusted | shiny ~polished; beautiful pretty cute adorable lovely ~attractive
  gorgeous | ugly ~hideous; calm | rough choppy; soft | hard; illuminated ~lit | unlit; low | high;
  different ~various ~assorted | identical ~matching; asian chinese japanese | american | italian
  mexican | french; commercial | military; public | private; front | back rear; top | bottom;
  healthy | unhealthy ~sickly; delicious tasty yummy | disgusting burnt; adult | baby; bald |
  long-haired; blonde blond | brunette dark-haired redheaded; electric | manual; homemade |
  store-bought; funny silly | serious; residential | industrial; christmas | halloween easter; alive
  | dead ; stuffed | real live ; real | fake toy ; larger bigger | smaller; taller | shorter; leafy
  | leafless; wooded forested | barren sandy; partial | full; stacked | scattered
"""
# "kinds: values that are not of them", "values: the only kinds they are of", "what a caption of the
# image says: values that may be true then".
VALUES_NEVER_OF = """
food: various assorted identical matching; place nature food animal: silver gold; place.land:
white; nature: grassy sandy; animal place.ground place.land nature.tree food.green: blue navy
turquoise teal green purple pink red maroon burgundy yellow"""
VALUES_ONLY_OF = """
crowded full: place vehicle structure container home picture device.kitchen; brick stone concrete:
structure place home.wall home.light"""
VALUES_TOLD = """night dusk evening: dark dim; snow: white"""
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
YOUNGER = {"little": "teenage", "small": "teenage"}  # of a boy or girl
OTHER_VALUES = """
same different various other many several few more asian american commercial stuffed professional
stainless nearby public delicious adult tasty nice military electric double single next own teenage
furnished healthy strange unique special typical real fake good great first second last main covered
fenced dressed painted tiled mounted decorated displayed fashioned lined assorted homemade blurry
light dark bald funny ready high low overhead baby multiple larger smaller dead close"""

# Acts.
POSTURE = "sit stand lie lay kneel crouch squat sleep rest lean pose perch wait relax lounge nap"
MOVING = (
    "walk run jog stroll crawl march hop ski snowboard skateboard skate surf race climb jump leap"
)
ROLLING = "drive travel move go come head cruise roll"
ACTS = f"""
{POSTURE} {MOVING} {ROLLING} dance ride slide sled fly float swim sail soar glide hover smell burn
explode fall spin crash graze eat feed drink play fight sing cry look stare gaze watch point yell
laugh wave growl bark bow talk speak chat step draw work smile frown reach search hang balance swing
hold carry use throw toss catch kick hit wear read cut slice chop cook prepare make serve wash clean
brush pet hug kiss chase push pull tow lead repair fix paint drop fold iron sew tear break pour
spill peel photograph cross leave enter grab show display lick sniff bite chew shear bake grill fry
buy sell board load unload sweep wipe scrub film lift pick take put get have give do try perform
touch follow surround cover contain enjoy share practice approach blow stop turn bend tie shave type
text dig row paddle dry return taste gather cuddle scratch climb peek roam wander dine wade wrestle
milk herd coach examine swat fill seat face pass include feature squat pitch travel stick overlook
crouch hike dangle grow celebrate land park sunbathe lack display bat pitch stretch enter exit rise
sip cycle"""
# "kind of thing: what can be done to it"
DONE_TO = """
animal.pet: feed wash pet chase hug carry brush hold kiss watch; animal: ride feed wash pet chase
hug brush photograph lead kiss watch; person: hug chase push carry kiss photograph lift follow hold
feed watch; car truck van taxi jeep tractor: drive push wash repair paint pull watch pass;
motorcycle bike bicycle scooter: ride push wash repair paint pull watch pass; kite: buy; vehicle:
drive ride push wash repair paint board load pull watch pass; gear.board: ride hold carry throw kick
wash repair paint; gear.ski: wear hold carry ; gear.ball: hold throw carry kick catch hit chase
watch; gear.bat: swing hold carry throw; gear: hold wear carry throw repair paint; food: eat cut
hold throw cook drop prepare serve make; drink: drink pour spill throw serve hold; luggage suitcase
bag backpack: hold carry throw; clothing: wear hold wash fold; device.kitchen: clean paint repair;
computer laptop keyboard: use repair carry throw paint; device: hold use repair throw paint watch
carry; fixture: clean paint repair use; furniture: carry paint clean push repair; container: hold
wash carry throw paint fill; tool: hold carry throw drop use; device.hand: hold use repair throw;
photo photograph selfie picture: hold; home.read: read hold tear burn throw fold carry; home.toy:
hold hug carry throw kick; home: carry throw paint hold; feat: perform do watch film; structure:
watch paint climb photograph clean pass; place.road: cross clean paint sweep photograph; place:
watch photograph leave paint enter cross; sport: play watch coach practice; nature: watch cut paint
carry photograph hold climb; food.sauce: pour spill taste; any: paint carry"""
# "who is no person, kinds of thing: what they can do to it"
DOES = """
animal person animal: chase push lick sniff follow lead watch; animal food nature: eat carry drop
lick sniff smell; animal gear.ball home.toy clothing device.hand container tool gear.board: carry
drop lick sniff chase kick push; vehicle vehicle: push pull follow hit pass tow"""
# Acts of one group can go together, so that one never replaces another.
TOGETHER = """
hold carry lift take use eat drink read show swing fly cut catch grab pick have get display; hold
throw toss serve hit return swing catch; hold pet hug feed brush peel drop kiss lead walk photograph
fold sniff touch cuddle push pull row watch; carry hug use push pull lead row paddle fly put load;
ride drive use board wear surf lead race sail enjoy row paddle do perform balance walk; cook make
prepare cut serve eat chop bake peel fry grill slice hold get enjoy share; eat drink taste bite chew
lick sniff enjoy share feed take touch; wash clean brush scrub wipe dry sweep; push pull move lead
hit kick tow; kick hit throw toss catch chase play serve swing swat return drop use; feed pet hug
kiss watch touch lick follow photograph; chase herd follow lead watch walk; use repair fix paint
type text cut fly read watch; pour drink serve fill spill; wear have put use show display try take
get; play use practice enjoy; take do perform practice have; photograph watch film face show pass
cross leave approach enjoy enter climb; climb cross enter leave pass; paint draw make; break cut
slice; stand surf ski skate skateboard snowboard ride eat talk play fly sing wait pose drink graze
feed perform work cook swing hit throw; sit ride eat talk drive fly play swing work read drink feed
perch float; lie lay surf rest relax sunbathe float; ride grab jump; hit serve swing carry; hit
serve kick throw catch watch; pose sit; pose lie lay; pose kneel crouch squat; play lie lay; walk
ski climb talk eat cross graze play feed; jump ski snowboard skateboard skate surf ride dance run
fly swim play fall climb; run play jump chase race fight swim; kneel surf play work; crouch squat
bend kneel ski surf skateboard snowboard skate ride play swing; dance play perform sing; crawl climb
play; fall jump fly slide; ski snowboard skateboard skate surf ride slide glide race; float sail
travel move sit drive go swim; fly travel move go come float hang soar; play fight wrestle swim wade
float; eat graze feed drink; hang fall balance; smile laugh wave; park sit; spin turn move drive
fly; swim surf; burn fall crash"""
# "subject: acts | acts ...", all without an object: what stands apart by | excludes each other; an
# act with ~ is never chosen.
FREE = """
person: sit ~relax ~lounge ~rest ~perch | stand ~wait ~pose ~lean ~balance | lie lay sleep ~nap |
walk ~stroll ~march ~wander ~go ~move ~travel ~come ~head ~hike | run jog ~race | jump ~leap ~hop
~flip | kneel crouch squat ~bend | dance | crawl | ~swim ~wade | ~ski ~glide ~slide | ~snowboard |
~skateboard ~skate | ~surf | ~ride ~drive ~cruise ~roll | ~climb | ~fly ~soar ~float | ~fall | ~play
| eat ~dine | ~talk ~speak ~chat | ~work; animal: sit ~rest ~perch ~relax ~lounge ~lie ~lay ~sleep
~nap | stand ~wait ~pose ~lean | walk ~stroll ~roam ~wander ~go ~move ~travel ~come ~head ~march |
run ~race | jump ~leap ~hop | ~swim ~wade ~float | ~fly ~soar ~hover ~glide | eat ~feed ~graze
~drink | ~fight | ~play | ~crawl | ~climb; vehicle: park sit ~stand ~stop ~rest ~wait ~lean ~lie
~lay | drive ~travel move ~go ~come ~roll ~cruise ~head ~run ~race | ~fly ~soar ~glide ~hover |
~float ~sail | ~crash | ~burn; thing: ~sit ~rest ~stand ~lie ~lay ~wait"""
ANY_ACT = {"person": ("sleep", "dance", "crawl"), "animal": ("sleep", "run", "jump")}
# "acts preposition > acts that take it too"
WITH_PREPOSITION = """
look stare gaze watch at > point yell laugh wave; smile laugh at > cry yell frown point; smile for >
cry yell; pull drive into > crash; chew on > step; hold onto > jump climb fall; search look for >
wait; talk speak chat text type on > step sit stand; talk speak chat to > wave point bow; talk speak
chat with > dance wrestle sing; look stare gaze out > climb jump fall; look stare gaze peek into >
fall climb jump; look stare gaze over > jump climb; play with > sit; jump leap over > crawl fly
walk; ride on > stand kneel; ride in > sleep dance kneel"""
# "who: acts, relations or -, things or kinds after them > acts in the place of both".  The act none
# is for captions that tell no act; ? is a thing that the tables do not know, . no thing at all.
PAIRS = """
person: stand sit lean wait pose walk, next_to near beside by in_front_of behind, bicycle bike
motorcycle scooter horse elephant camel skateboard surfboard snowboard > ride; person: stand sit
lean wait pose walk, next_to near beside by in_front_of behind, car truck bus van tractor > drive;
person: ride, -, bicycle bike motorcycle scooter horse elephant camel skateboard surfboard snowboard
> stand_next_to look_at; person: ride sit, on on_the_back_of on_top_of, horse elephant camel donkey
motorcycle bicycle bike scooter > stand_next_to walk_beside; person: drive, -, car truck bus van
tractor > stand_next_to look_at; person: eat feed push pull wash cut cook, -, food animal vehicle >
point_at; person: hold carry, -, ? > point_at reach_for; person: hold carry eat wear use read drink
cut throw swing, -, food tool container device home gear clothing animal.pet > reach_for point_at;
person: hold carry use, -, umbrella parasol > throw repair; person: swing, -, gear.bat > drop;
person: brush, -, tooth > point_at; person: talk speak chat text type, on, device.hand > point_at
reach_for; person: use type work, on -, laptop computer > carry point_at; person: pose, for, picture
> look_at; person: pose smile look, for at into, camera > look_away_from; person: go come ride ski
snowboard slide skate skateboard travel walk run head move race fly glide sled, down, hill hillside
mountain slope ramp staircase > walk_up climb; person: walk climb hike go, up, hill hillside
mountain slope ramp staircase > run_down slide_down; person: jump leap fly soar, in_the_air
through_the_air, . > stand_on_the_ground sit_on_the_ground; person animal: walk run jog stroll
march, along down across up, place.road > sit_beside lie_beside; person animal: walk run jog stroll,
along across, place.ground place.land > lie_on; animal: eat graze feed, - on, grass hay > lie_on
sleep_on; animal: look stare gaze, at, person animal device picture vehicle structure >
walk_away_from; animal: drink, from out_of -, place.water > swim_in; animal: stand walk, around, . >
lie_around; animal: pull, -, vehicle > stand_next_to walk_behind; animal.bird: fly soar glide hover,
over above across, place.water > swim_in; animal.bird: fly soar glide hover, over above across,
place.ground place.land place.road > stand_on walk_on; animal.bird: sit stand perch walk, on
on_top_of, place structure furniture > fly_over; animal.bird: sit stand perch, on on_top_of in,
nature.tree > fly_past; home.wall home.light clothing gear tool structure: hang, on, home.wall
structure > lean_against fall_off; home.wall home.light home.toy clothing gear tool structure food:
hang, from, home structure nature place furniture ? > fall_from; home.wall home.light structure
tool: hang, over above, furniture place structure fixture > fall_onto lie_on; food container device
tool home gear clothing: sit lie lay rest placed set arranged laid, on on_top_of, furniture
container device fixture structure ? > fall_off; food tool home gear device: sit lie lay rest placed
arranged, in, container > fall_out_of; structure.street: sit stand, on on_the_side_of in, place.road
place.ground place.land > lie_on; vehicle: parked sit stopped stand, on along on_the_side_of in,
road street highway sidewalk > drive_down travel_down; vehicle: parked sit stopped stand, in,
parking_lot city town village > drive_through; vehicle: parked sit stopped stand rest, on on_top_of,
track train_track railroad_track > travel_down move_along; vehicle.road: parked sit stopped stand
wait, at outside outside_of in_front_of next_to by near beside, structure place.shop place.venue >
drive_past pass; vehicle.road: drive travel move go come ride head, down along up through, street
road highway path lane avenue driveway hill > park_beside; vehicle.road: drive travel move go roll
come, down along on, track train_track railroad_track > park_on; vehicle.road: drive travel move go,
on, street road highway > park_on; vehicle.road: drive travel move go come pass, through,
intersection city town village crossing > park_in; vehicle.water: drive travel move go come head,
down along up through, river > park_beside; vehicle.water: sit float sail move travel, in on through
across, place.water > sink_in; vehicle.air: parked sit stopped stand, on on_top_of, place.road
place.land > fly_over take_off_from; vehicle.air: fly soar glide, in through across, sky >
fall_from; vehicle.air gear.ball: fly soar glide float, in_the_sky in_the_air through_the_air, . >
fall_from_the_sky; vehicle.air: fly, over above, runway tarmac airport > park_on; food container
device tool home gear clothing: none, on on_top_of, furniture container device fixture
structure.pole > fall_off; food tool home gear: none, in, container.plate container.box
container.pan container.bin > fall_out_of; vehicle.water: none, in on, place.water > sink_in;
vehicle.air: none, on, place.road > fly_over; vehicle.road: none, on, place.road > burn_on;
vehicle.air gear.ball: none, in, sky > fall_from; vehicle.air gear.ball: none, in_the_sky
in_the_air, . > fall_from_the_sky; structure.street: none, on on_the_side_of, place.road
place.ground place.land > lie_on; home.wall home.light: none, on, home.wall structure > fall_off;
animal: none, in, place.ground place.land place.water place.cage > sleep_in jump_in run_in; animal:
none, on, place.ground place.land place.road furniture structure > sleep_on run_on; animal: none, by
near next_to behind in_front_of under beside, place structure nature vehicle > sleep_by sleep_near
run_near; person: none, in, place vehicle > sleep_in dance_in kneel_in; person: none, on, place
furniture > sleep_on dance_on kneel_on; person: none, by near next_to behind in_front_of under
beside, place structure nature vehicle > sleep_near dance_near kneel_near"""
# What stands in the place of an act when its two sides have nothing to do with each other.
APART = {
    "wear": ("without",),
    "ride": ("next to", "behind", "in front of"),
    **dict.fromkeys(("hold", "carry", "swing", "fly", "use", "read", "eat", "drink"), ("without",)),
}
PARTICIPLES = """
parked, stopped: driving, moving, traveling; seated: standing, kneeling, sleeping, walking;
gathered, huddled: dancing, fighting; smiling: crying, frowning; sleeping, curled: standing,
jumping; crying: smiling; held, carried: thrown, dropped; pulled: pushed, chased; stacked, piled,
lined up: scattered; scattered: stacked, lined up"""

# Relations.  "relations: kinds of thing after it = what contradicts it | ...", no kinds: any thing.
SOLID = "furniture vehicle animal container fixture device food tool home structure nature gear"
INDOORS = "place.room place.shop place.venue structure.house"
RELATIONS = f"""
on, atop, on top of: furniture vehicle gear.board animal container structure nature device
fixture = under, next to, behind, beside, in front of | food tool home gear = next to, behind,
beside | place.road place.ground place.court = next to, beside, far from | place.land = next to,
far from, beside | place.water = next to, beside | other = next to, behind, beside | ? = behind,
next to; in: sport.event = after | place.room = outside | {INDOORS} = outside, in front of,
behind | place.water = next to, beside | place.ground place.cage place.court = next to, outside,
beside, far from | place.city = outside, far from | place.road = next to, beside | place.land =
next to, far from, beside | furniture.seat furniture.bed = next to, behind, beside, in front of,
under | {SOLID} = next to, behind, beside, in front of, on, on top of, under | clothing =
without; underneath, under, beneath: nature.tree tool = far from | {SOLID} = on top of, on,
behind, in front of, far from | it other = behind, on | ? = behind; over: {SOLID} = under |
place.road place.ground place.water place.city = far from; above: {SOLID} = below, under | sky ?
= below; below: {SOLID} = above, on, behind | ? it = above; inside, inside of: {INDOORS} =
outside, behind, in front of | {SOLID} = outside of, next to, behind, in front of, beside, on,
under; outside, outside of: {INDOORS} = inside, in | = inside; in front of: {INDOORS} = behind,
in, inside | {SOLID} = behind, on, under, on top of, in, inside | person ? = behind | place.water
place.ground place.road place.land = in, on, behind, far from; behind: {INDOORS} = in front of,
in, inside | {SOLID} = in front of, on, under, in, on top of | person ? = in front of; next to,
beside: {INDOORS} = in, inside, far from | {SOLID} = on, under, in, on top of, inside, far from |
place.water place.ground place.court place.road place.land = in, on, far from | person other ? =
far from; by, near, close to: {INDOORS} = in, inside, far from | {SOLID} = on, under, in, on top
of, inside, far from | place.water place.ground place.court place.road place.land = in, on, far
from | person other ? = far from; at: furniture.top = under, on, far from, on top of | place.room
= far from, outside | place structure fixture ? = far from | sport.event = before, after; around:
{SOLID} place = far from; surrounded by: = far from; between: = behind, in front of; along:
place.road place.water = far from, across | place.ground = far from; through: place.ground
place.cage place.city structure = past | place.water = past, along; down, up: place.road = across
| place.ground structure = up, down; across: place.road = along, down | place.ground place.court
place.water = past; into: place vehicle structure container fixture ? = out of, past, away from;
out of: place vehicle structure fixture container = into, past, away from; towards, toward:
person {SOLID} place ? = away from, past; to, up to: person {SOLID} place = away from, past; on
the front of: {SOLID} = on the back of, behind; on the left side of: = on the right side of; on
the right side of: = on the left side of; on the left of: = on the right of; on the right of: =
on the left of; on the inside of: = on the outside of; on the outside of: = on the inside of; at
the base of, at the foot of: = at the top of; the top of: = the bottom of; the bottom of: = the
top of; the inside of: = the outside of; the outside of: = the inside of; the front of: = the
back of; the back of: = the front of; the edge of: = the middle of; at the end of: place.road
structure = in the middle of; against: {SOLID} = away from, behind, far from; away from: =
towards, near; past: place structure = into; onto: {SOLID} place = off of; off, off of: furniture
vehicle structure gear.board place = onto; with: = without; without: = with; to the left of: = to
the right of; to the right of: = to the left of; on the side of, on the edge of: place furniture
= in the middle of, far from; in the middle of: place.road place.ground place.court place.land
place.water furniture = on the edge of, far from; during: sport.event = before; in the distance,
in the background: = in the foreground; at night: = at noon; at the top of, on the top of: = at
the bottom of; at the bottom of: = at the top of; on the back of, in the back of: = in front of,
next to, under, near; in the foreground: = in the background; full of, filled with, topped with,
covered with, covered in, decorated with, lined with, loaded with: = without; has: = lacks; have:
= lack; containing: = lacking, beside, next to; outdoors: = indoors; indoors: = outdoors; in the
sky, in the air, through the air: = near the ground; on the ground: = on the roof; on the wall: =
on the floor; attached to: = detached from, behind; side by side: = far apart; together: = apart;
among, amongst: = far from; within: = outside; on top: = underneath"""
# Relations that mean much the same.
SAME_PLACES = """
on, on top of, atop, onto; in, inside, inside of, within; outside, outside of; across, over; next
to, beside, by, near, close to, alongside; under, underneath, beneath, below"""
# "relation: who = what they can be on, in, under ... | ...", kinds or single words of both.
GROUNDED = """
on: person = furniture.seat furniture.bed furniture.top gear.board horse elephant camel donkey
bicycle bike motorcycle scooter tractor boat truck suitcase box rug blanket towel pillow rock log
roof balcony porch deck bridge rooftop dock pier staircase runway place.road beach hill grass sand
snow | animal.pet animal.bird = furniture gear.board car truck boat motorcycle bicycle suitcase box
plate tray rug blanket towel pillow book newspaper laptop keyboard printer television rock log roof
fence balcony porch deck bridge rooftop dock pier windowsill place.road beach hill grass sand snow
refrigerator toilet sink | animal = rock hill place.road bridge beach grass sand snow truck boat
blanket rug | vehicle.road vehicle.air = place.road bridge runway beach grass sand snow hill dock
truck boat | structure fixture = place.road grass hill beach bridge sand | food container tool gear
device home clothing = furniture plate tray napkin cutting_board towel rug blanket pillow book
newspaper box suitcase refrigerator oven microwave stool laptop keyboard car motorcycle bicycle boat
rock log roof porch dock bench grass sand beach sidewalk street toilet sink windowsill | furniture =
rug grass sidewalk street beach porch balcony deck roof dock boat truck | nature.flower = furniture
plate book windowsill; in: person = place.room place.shop structure.house car truck bus van taxi
train boat lake river swimming_pool fountain ocean field forest park garden airport train_station
school bed bathtub hammock tree box snow | animal.pet = place.room place.shop structure.house
container.box container.bin car truck bus van boat lake river swimming_pool ocean field forest park
garden bed sink bathtub toilet drawer tree suitcase refrigerator bowl | animal = river lake field
forest truck boat cage garden barn structure.house | vehicle = river lake field forest garage barn
water snow | food tool container device home gear clothing = container.box container.bin
container.cup bowl pan refrigerator oven microwave sink bathtub bed car truck boat drawer cabinet
suitcase tree swimming_pool river lake toilet ; under: person animal = nature.tree umbrella bridge
tent table desk bench roof truck bus car structure.street kite airplane balcony blanket bed clock |
vehicle = nature.tree bridge roof structure.street airplane balcony | food tool container device
home gear clothing = furniture.top furniture.seat furniture.bed tree umbrella bridge car truck
blanket towel pillow book laptop plate box | structure furniture fixture = nature.tree bridge roof
balcony umbrella tent clock shelf mirror"""
# What of any kind they can be behind, far from, outside.
AROUND = {
    "far from": "person animal vehicle structure place nature.tree furniture fixture ?",
    "outside": "place.room place.shop place.venue structure.house vehicle place.court place.cage",
    "in front of": "person animal vehicle structure furniture fixture device container nature "
    "home.toy home.soft home.light home.read "
    "place.room place.shop place.venue clock ?",
}
AROUND["behind"] = AROUND["in front of"]
# Who can do an act to whom, and who can be where the other was: kinds whose things change places.
SWAPPED = """
person animal = chase follow approach lead push pull lick feed | behind in_front_of; vehicle =
follow pull tow push pass hit approach | behind in_front_of; food = | on under behind in_front_of
on_top_of over; container device tool home gear = | on under behind in_front_of on_top_of in inside;
structure = | behind in_front_of"""
AGREEMENT = {"is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has"}

# Words by tag, see Token; and words with a quirk.
FUNCTION_WORDS = """
D: a an the this these those some his her their its my our your each every another both all no any;
M: one nine ten twelve dozens hundreds; I: is are was were be been being am has have had can will do
did not it's there's that's could should would; E: ridden worn blown driven broken written made
shown seen held eaten taken used built tied thrown drawn flown laid kept caught hung; P: of to from
for after before as like off than past thru onto upon during within including consisting featuring
missing via among amongst about; C: as and or but while when because if that's so & where then; Q:
he she it they we you i him them me us someone somebody who which that what himself herself itself
themselves there everyone another's one's others each_other one_another; R: very just also not away
together alone outdoors indoors here too down up out about ahead almost still only nearly partially
sideways upside else over back well"""
WORD_SETS = """
plural only: scissors, pants, shorts, pajamas, overalls, glasses, sunglasses, headphones, earrings,
electronics, supplies, clothes, traffic, eyeglasses, luggage, cattle, silverware, clothing, stairs;
doubled: sit, run, jog, swim, cut, hit, pet, hug, stop, put, get, nap, hop, spin, swat, grab, dig,
step, squat, drop, flip, chop, skip, slip, snap, trim, wrap, sip, bat; lonely: outside, inside,
together, outdoors, indoors, side by side, on top, on display, in the sky, in the air, through the
air, on the ground, on the floor, on the wall, in the background, in the foreground, in the
distance, at night; lackings: without, lacks, lack, lacking, free of, empty of; idioms: stick, area,
home, leash, way, fire, use, display, line, case, mid; lacking: with, has, have, containing, filled
with, topped with, covered with, covered in, decorated with, lined with, loaded with; possessive:
it's, his, her, its, their, my, our, your; not lacked: his, her, its, their, my, our, your, lots,
dozens, different, lot, variety, more, multiple, just, assorted, many, several, some, few, various,
other, no, both, all, each, every; seated: lap, laptop, computer, couch, sofa, chair; leading: for,
after, to, by, like, from, as, of, onto, against; wheeled: traffic, bicycle, bike, scooter, cart,
carriage, wagon, bicycles, bikes, scooters, carts, carriages, wagons; done feats: do, perform,
practice, try, make, attempt; airy: air, sky, skies, in the air, in the sky, through the air; swum:
swim, surf, float, wade; almost: year, years, foot, feet, inch, inches, month, months, day, meter,
un, non, semi, stir, deep, pan, multi, fully, well, stainless, freshly, brightly, dimly, wide,
cross, half, partially, partly, almost, nearly; ways: through, down, along, across, past, towards,
toward; boarded: wave, surfboard, swim, swimming, kiteboarding, surf, surfing, surfs, surfer, ski,
skiing, skate, skateboarding, skating, snowboarding, snowboard, skateboarder; either: wall, snow,
sand, window, doorway, boat, canoe, raft, ship, sink, tub, bathtub, bed, grass, chair, couch, sofa,
street, plate, corner; set phrases: in mirror, up to bat, at bat, to bat, to plate, around corner,
at corner, on corner, in corner; built in: window, door, wall, floor, roof, doorway; counting: lone,
solitary, each, other, each other, one another, another, both, together, alone, its, their, it,
they, them, itself, one, single, whole, pair, side by side, his, her, different; looks: look, stare,
gaze, point, watch; aged: bearded, bald, beard, child, kid, young, teenager, teen, youth, adult,
old, older, elderly, little, small; steered: row, paddle, sail, ride, drive, fly, travel; haste:
fast, quickly, speed, speeding; desks: keyboard, computer, laptop, desk, monitor; portions: piece,
slice, plate; loose: wine, paint, laundry, water, juice, milk, coffee, tea, beer, rice, soup, pasta,
spaghetti, cereal, ketchup, mustard, butter, cream, honey, jam; mounted: horseback, horse, bicycle,
bike, motorcycle, scooter, elephant; made for: prepare, make, get, take, have, do; compared: larger,
bigger, smaller, taller, shorter, longer; parents: dad, father, mom, mother, parent, mommy, daddy;
watery: clear, deep, shallow, choppy, calm, rough, blue, open; plurals: few, couple, lot, dozen,
bunch; vague: savannah, savanna, plain, grassland, beach, shore, river, sink, counter, counter top,
countertop, stove, oven, window, branch, tree branch, market, slope, ski slope, hillside, mountain,
mountainside, wood, forest, jungle, shore, shoreline, coast, bank, edge, river bank, riverbank; of
leg: short, long, tall; of hat: top, hard; of boy: baby; of girl: baby; of side: country; of bike:
dirt; of bread: sliced; of sum: dim; of fudge: hot; of sundae: hot; of hill: steep; of hillside:
steep; of slope: steep; of ski slope: steep; of mountain: steep, tall, high; of ramp: steep; of
calf: old, older, elderly, young; of puppy: young; of kitten: young; of view: full, clear; of jet:
military; of flag: american, japanese, chinese; of balcony: sunny; of bus: passenger, commuter,
subway, freight, cargo; of glasses: dark, bright; of sunglasses: dark, bright; of city: urban,
rural; of cliff: steep, tall, high; of teddy bear: stuffed, real, live, fake; of town: urban, rural;
of baby: old, older, elderly, young; of infant: old, older, elderly, young; of toddler: old, older,
elderly, young; holding: bowl, tray, plate, basket, box, bucket, cup, glass, bottle, mug, jar,
pitcher, pot, bag, crate, barrel; perches: tree, fence, branch, tree branch, pole, bush; low: rock,
boulder, stone, log, cactus, haystack, bush; can be along: street, road, highway, path, trail,
sidewalk, walkway, river, stream, shore, shoreline, beach, track, train track, railroad track, lake,
fence, wall, pier; can be across: street, road, highway, intersection, bridge, field, parking lot,
lot, freeway, avenue, roadway, lane; can be up: hill, hillside, mountain, mountainside, slope, ski
slope, ramp, staircase, stair, ladder, tree, pole, street, road; surfaces: surface, lamp post,
telephone pole, pole, post, counter top, countertop, table top, tabletop, tablecloth, table cloth,
cloth, mat, floor; materials: brick, stone, wooden, wood, metal, steel, glass, concrete, leather,
plastic; geared: skateboard, ski, snowboard, surf, skate; owners: trunk, roof, body, section,
tarmac, aisle, department, game, set, slope, flight, sill, ledge, frame, shore, shoreline, skyline,
floor, coast, bank; letters: tv, tvs, pc, pcs; before kept: play, playing, take, up, travel,
winning, win, won, including, like, as; shades: silver, gold, white, black; reached: in, into,
inside, out of, through, from; needy: load, blow, put, place, mix, work, get, pass; denials: no,
not, without, nor; sporty: serve, batter, hitter, pitcher, catcher, inning, motorcycle, bike,
bicycle, skateboard, surfboard, snowboard, pitch, bat, base, plate, umpire, racket, racquet, wave,
slope, ski; aims: above, off of, alongside, on, on top of, from, off, out of, with, to, at, for,
over, up, down, as, while, around, through, along, across; floors: floor, ceiling, tile, sill,
window sill, wall; often on: hold, carry, throw, feed, push, wash, repair, paint, lead, kick, chase;
often with: throw, wash, push, lead, kick, chase, paint, repair; needed: on, in, at, outside,
inside, down, on top of, on the back of; joined: intersection, meeting, mix; described: and, of, in,
on, that, background, with, up, down, about, off, which, without, inside, inside of, on top of;
horizon: sky, cloud, mountain, horizon, hill; taken off: jacket, coat, sweater, vest, apron,
uniform, costume, wetsuit, suit, robe; plural subject: each other, together, both; vague numbers:
several, many, multiple, few; moving: walk, run, jog, stroll, roam, wander, wonder, march, move,
travel, go, come, head, pass, race, drive, chase; standing: stand, graze, pose, wait, surf,
skateboard, skate, ski; plain values: big, large, small, little, old, new, young, red, blue, green,
yellow, white, black, brown, gray, grey, pink, purple, orange, tan, colorful, wooden, empty, dirty,
clean; bound to sport: wave, serve, batter, hitter, pitcher, catcher, umpire, inning, bat, at bat;
before no act: country, on, wind, kite, para, sand, water, jet, body, from, without, after, help; by
themselves: himself, herself, itself, themselves, underneath, beneath, smooth, smoothly; parts of
toilet: lid, seat, tank; parts of stove: burner, oven; parts of bathroom: toilet paper, commode;
parts of carriage: drawn, pull; parts of skateboarder: board; parts of snowboarder: board; parts of
surfer: board; after kept: fashioned, haired, faced, style, other; sizes: big, large, small, little,
long, short, tall, huge, tiny; in play: hit, serve, swing, swung, catch, ready, wait, batter, pitch,
bat, prepare; placing: on, on top of, atop, in, inside, under, over, across, by, near, next to,
beside; listing: with, has, have, containing, of; held still: wave, wheel, statue, sculpture,
figurine, underneath; names: red sox, big ben, little league; links: that, who, which, while;
states: hold, contain, show, include, cover, surround, feature, have, use, make, carry; busy: try,
get, prepare, attempt, use, go, come; persons: who, he, she, someone, they; particles: up, down,
out, off; ages: young, little, small, teenage, old, older, elderly, younger, baby; after acts: on,
in, next to, near, in front of, at, by, behind, under, beside, with, while, on top of, outside,
inside, ., together, between, around; fixed next to: right, directly, close; fixed in front of:
right, directly; fixed on: displayed, mount, mounted, hung, hang, load, focus, emphasis, attention,
concentrate, stacked, piled, stack, pile, surf, lean, talk, work, speak, chat, display, put; fixed
in: encased, partake, view, hide, docked, anchored, bury, buried, submerged, stuck, bathe, wash,
fenced, closed, dressed, covered, wrapped; placed: parked, seated, stopped, docked, gathered,
located; fixed at: point, yell, laugh, wave, swing, throw; fixed together: play; fixed off: sit,
stand, lie, lay, hang; fixed off of: sit, stand, lie, lay, hang; fixed covered with: partially,
half, partly; fixed covered in: partially, half, partly; fixed against: up; fixed up: line, close,
lined, dressed, set; fixed behind: hide, right, directly, close; fixed down: descent, descend,
snowboard, sled; fixed inside: view; fixed out of: stick, hang, peek, peer, pop, made, make; fixed
over: tower, hover, lean, bend, reach, all, look, way; alone: stand, sit, walk, pose, lie, lay, run,
eat, travel, jump; fixed into: put, pour, look, cut, turn, made; near few: many; near dirt: sandy;
near sandy: dirt; near snowy: rocky, muddy; near red: orange, pink; near orange: red, yellow, brown;
near pink: red, purple; near purple: pink, blue; near brown: orange; near tan: white, yellow; near
white: gray; near black: gray, grey, silver; near gray: white, black; near silver: white, black;
near grey: white, black; near yellow: orange; near blue: purple; paths: off of, through the air,
down, up, through, along, across, past, into, out of, towards, toward, around, over, off, onto, to,
away from, from; along: carry, push, pull, ride, drive, lead, throw, chase, walk, kick; sex M: man,
guy, boy, male, gentleman, dude, he, his, him, teenager, kid, child; sex F: woman, lady, girl,
female, she, her, teenager, kid, child; weather: rain, snow, fog, water, sky, air, wave, surf,
ground, smoke, fire; never in: log, pizza, sofa, group, door, wall, fence, beach, cliff, hill,
rooftop, runway, pier, bridge, sidewalk, motorcycle, scooter, bicycle, bench, couch, stool,
skateboard, surfboard, snowboard, table, desk, farm, harbor, road, river, plate, tray, napkin,
cutting board, driveway, railroad track, dresser, nightstand, zoo; never at: field, forest, desert,
shelf, dresser, nightstand, bookshelf, bookcase, wardrobe, drawer, cabinet, cupboard; never on:
swimming pool, pool, parking lot, window, door, lighthouse, pan, pot, skillet, river, vase, bowl,
cup, glass, mug, bottle, jar, basket, bucket, mirror, tree, forest, desert, garden, valley, swamp,
castle, church, village, city, office, field, hallway, kitchen, bathroom, bedroom, restaurant,
store, bakery, museum, library, hospital, park, market, lake, pond, ocean"""


# Making negatives

Edit = tuple[int, int, str]  # start, end, new text


class Negative(NamedTuple):
    """A hard negative and the edits that made it: offsets in the caption, and what went there."""

    text: str | None
    edits: tuple[Edit, ...]
    how: str = "replace"  # or "exchange"; where the text is None, the rule that left none


def make_negatives(
    caption: str,
    *,
    seed: int = 0,
    key: str | int = "",
    types: Sequence[str] = NEGATIVE_TYPES,
    forbidden: frozenset[str] = frozenset(),
    slots: Slots | None = None,
) -> dict[str, str | None]:
    """Rewrite one caption into a hard negative of each type.

    The result depends on the arguments alone, never on the order of calls or the process.

    Args:
        caption: one English sentence; anything else is allowed and gives nulls.
        seed: another seed, other choices.
        key: tells equal captions apart, such as the id of the image.
        types: which of ``NEGATIVE_TYPES`` to make.
        forbidden: lower-case words that no negative may bring in, such as the words of the other
            captions of the image, which may well be true of it; a relation of several words, such
            as "next to", as one of them.
        slots: what ``learn_slots`` learned from the corpus; without it every safe edit is as
            likely as another, and odd ones are easy to tell from captions.

    Returns:
        For each type, in the order of ``NEGATIVE_TYPES``, a sentence or None.  No sentence equals
        the caption (without regard to case, spaces and inflection) or another of the four.

    Raises:
        ValueError: a type is unknown, or ``forbidden`` is a text.
    """
    if isinstance(forbidden, str):
        raise ValueError(f"forbidden: want a set of words, not the text {forbidden!r}")
    made = edit_sentence(_read(caption, forbidden), seed=seed, key=key, types=types, slots=slots)
    return {name: negative and negative.text for name, negative in made.items()}


def edit_sentence(
    sentence: Sentence | None,
    *,
    seed: int = 0,
    key: str | int = "",
    types: Sequence[str] = NEGATIVE_TYPES,
    slots: Slots | None = None,
) -> dict[str, Negative | None]:
    """What ``make_negatives`` returns, with the edits, of a caption that has been read."""
    negatives: dict[str, Negative | None] = dict.fromkeys(_ordered(types))
    if sentence is None:
        return negatives
    seen = {_plain(sentence.caption)}
    start = f"{seed}:{key}:{sentence.caption}".encode("utf-8", "surrogatepass")
    bits = hashlib.blake2b(start, digest_size=32).digest()
    for name in negatives:
        place = 8 * NEGATIVE_TYPES.index(name)
        draw = int.from_bytes(bits[place : place + 8], "big")
        candidates = EDITORS[name](sentence, slots)
        step = 1 + len(candidates) // MAX_CANDIDATES
        candidates = candidates[draw % step :: step]
        if slots and slots.refine < inf:
            candidates.append(NONE)
        logs = [0.0] * len(candidates)
        if slots and candidates:
            logs = _weigh(sentence, candidates, name, slots)
        for chosen in _drawn(candidates, logs, draw):
            if not chosen:
                break
            edits = _written(sentence, chosen)
            text = _apply(sentence.caption, edits)
            if _plain(text) not in seen:
                seen.add(_plain(text))
                how = "exchange" if chosen[0].moved else "replace"
                negatives[name] = Negative(text, tuple(edits), how)
                break
    return negatives


def _ordered(types: Iterable[str]) -> list[str]:
    """The types in the order of NEGATIVE_TYPES; a ValueError names one that is unknown."""
    wanted = [types] if isinstance(types, str) else list(types)
    for name in wanted:
        if name not in NEGATIVE_TYPES or isinstance(types, str):
            raise ValueError(f"unknown negative type {name!r}; known are {NEGATIVE_TYPES}")
    return [name for name in NEGATIVE_TYPES if name in wanted]


def _plain(text: str) -> str:
    """Equal for texts that differ in case, spaces or inflection only."""
    words = text.casefold().split()
    return " ".join(map(LEMMAS.get, words, words))


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
        if not offered:
            offered = [
                (w, same)
                for p, (_, same) in zip(poles, pairs, strict=True)
                for w in p
                if w[0] != "~"
            ]
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
        offered = [
            [(w, frozenset(x.lstrip("~") for x in pole)) for w in pole if w[0] != "~"]
            for pole in poles
        ]
        for k, pole in enumerate(poles):
            others = tuple(o for j, row in enumerate(offered) if j != k for o in row)
            for word in pole:
                values[word.lstrip("~")].append(Sense(name.partition("@")[2], False, others))
    return dict(values)


def _read_relations() -> dict[str, list[tuple[list[str], list[str]]]]:
    """For each relation rows of the kinds that may follow it and of what contradicts it."""
    relations = {}
    for names, groups in _entries(RELATIONS):
        rows = [group.rpartition("=") for group in groups.split("|")]
        for name in _items(names):
            relations[name] = [(kinds.split(), _items(targets)) for kinds, _, targets in rows]
    return relations


def _read_grounds() -> dict[str, list[tuple[list[str], list[str]]]]:
    """For each of on, in, under: rows of who can be there, and of what."""
    grounds = {}
    for relation, groups in _entries(GROUNDED):
        rows = [group.split("=") for group in groups.split("|")]
        grounds[relation] = [(_names(who), _names(what)) for who, what in rows]
    return grounds | {"on top of": grounds["on"], "inside": grounds["in"]}


def _names(words: str) -> list[str]:
    return [word.replace("_", " ") for word in words.split()]


def _read_free() -> dict[tuple[str, str], list[str]]:
    """Acts without an object that (subject, act) may become."""
    free = {}
    for who, acts in _entries(FREE):
        groups = [group.split() for group in acts.split("|")]
        for group in groups:
            others = [a for g in groups if g is not group for a in g if a[0] != "~"]
            free.update({(who, act.lstrip("~")): others for act in group})
    return free


@functools.cache
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


@functools.cache
def _inflect(verb: str, form: str) -> str:
    """Form G (riding), Z (rides) or B (ride) of a verb, and what stands after it."""
    verb, space, rest = verb.partition(" ")
    return _inflected(verb, form) + space + rest


def _inflected(verb: str, form: str) -> str:
    if verb == "park":  # the vehicle itself does not
        return {"G": "parked", "Z": "is parked", "B": "are parked"}[form]
    if form == "G" and verb in SETS["doubled"]:
        return verb + verb[-1] + "ing"
    if form == "G":
        return re.sub(r"(?<=[^eo])e$", "", re.sub(r"ie$", "y", verb)) + "ing"
    if form == "Z" and re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    if form == "Z":
        return verb + ("es" if re.search(r"([sxzo]|ch|sh)$", verb) else "s")
    return verb


# By kind: the kinds that a thing changes places with, and across which acts and relations.
SWAPS: dict[str, tuple[str, set[str], set[str]]] = {}
for _kinds, _words in _entries(SWAPPED, "="):
    _doing, _being = (set(_names(words)) for words in _words.split("|"))
    SWAPS |= dict.fromkeys(_kinds.split(), (_kinds, _doing, _being))
PRONOUN_KINDS = {"each other": "other", "one another": "other"}
PRONOUN_KINDS |= dict.fromkeys(("it", "them", "him", "her"), "it")
NO_SENSE = Sense("", False, ())
SETS = {name: frozenset(_items(words)) for name, words in _entries(WORD_SETS)}
NEVER = {name: SETS[f"never {name}"] for name in ("in", "on", "at")}
NEVER |= {"inside": NEVER["in"], "on top of": NEVER["on"]}
PARTICULAR = {*SEXES, *SETS["built in"], *SETS["plural only"]}.union(*NEVER.values())
SETS["after free acts"] = SETS["after acts"] | SETS["paths"] | {"and", "as"}
SETS["can be down"] = SETS["can be up"]
SETS["goes on"] = SETS["paths"] | {"at", "for", "as"}
SETS["owned"] = SETS["possessive"] | {"one", "each", "both", "right", "left"}
SAME_RELATIONS = {w: _items(same) for same in SAME_PLACES.split(";") for w in _items(same)}
SETS["aloft"] = SETS["airy"] | {"wave"}
SETS["held still"] |= SETS["airy"]
SETS["never beside"] = SETS["weather"] | SETS["floors"]
IRREGULAR_PLURALS = dict(pair.split(":") for pair in PLURALS.split())
SENSES, VALUE_SENSES, RELATION_ROWS = _read_things(), _read_values(), _read_relations()
GROUNDS = _read_grounds()
CLASHING: dict[str, list[tuple[set[str], list[str]]]] = defaultdict(list)
for _kinds, _row in _entries(CLASHES):
    _told, _, _ruled_out = _row.partition(">")
    for _one in _kinds.split():
        CLASHING[_one].append((set(_names(_told)), _names(_ruled_out)))
NEVER_VALUES = [(kinds.split(), values.split()) for kinds, values in _entries(VALUES_NEVER_OF)]
ONLY_VALUES = [(values.split(), kinds.split()) for values, kinds in _entries(VALUES_ONLY_OF)]
TOLD_VALUES = [(set(told.split()), values.split()) for told, values in _entries(VALUES_TOLD)]
DONE = {kind: acts.split() for kinds, acts in _entries(DONE_TO) for kind in kinds.split()}
DONE_BY = [
    (subject, kinds.split(), acts.split())
    for left, acts in _entries(DOES)
    for subject, _, kinds in [left.partition(" ")]
]
FREE_ACTS = _read_free()
PREPOSITIONAL_ACTS = {
    (act, left.split()[-1]): right.split()
    for left, right in _entries(WITH_PREPOSITION, ">")
    for act in left.split()[:-1]
}
PAIRED_ACTS: dict[tuple[str, str], list[tuple[list[str], list[str], list[str]]]] = defaultdict(list)
for _who, _entry in _entries(PAIRS):
    _left, _, _right = _entry.partition(">")
    _olds, _relations, _kinds = _items(_left)
    for _old, _relation_word in itertools.product(_olds.split(), _relations.split()):
        _place = _relation_word.replace("_", " ").strip("-")
        PAIRED_ACTS[_old, _place].append((_who.split(), _names(_kinds), _names(_right)))
PARTICIPLE_ACTS = {w: _items(acts) for ws, acts in _entries(PARTICIPLES) for w in _items(ws)}
PARTNERS = {  # numbers of the groups that an act stands in
    act: {n for n, group in enumerate(TOGETHER.split(";")) if act in group.split()}
    for act in TOGETHER.replace(";", " ").split()
}
SAME_ACTS: dict[str, set[str]] = defaultdict(set)  # the other words of an act, by act
for _who, _groups in _entries(FREE):
    for _group in _groups.split("|") if _who in MOVERS else ():
        _acts_of = {act.lstrip("~") for act in _group.split()} if "park" not in _group else set()
        for _act in _acts_of:
            SAME_ACTS[_act] |= _acts_of
ACT_VALUES = {
    w
    for group in ("sleeping", "flying", "grazing", "parked", "standing", "seated", "smiling")
    for w in [group]
}
POSTURES, MOVES = set(POSTURE.split()), {*MOVING.split(), *ROLLING.split(), "fly", "ride", "slide"}
IMPLIED = [SETS["moving"], SETS["standing"]]
STILL = {*POSTURES, "eat", "work", "play", "talk", "dine"}
LED: dict[str, set[str]] = {  # acts that these relations must follow, any if none
    "to": MOVES - {"move", "come"},
    "up to": MOVES | {"pull"},
    "onto": MOVES,
    **{relation: set() for relation in ("from", "out of", "into")},
}
LAID = {"lie", "sleep", "sit", "stand", "kneel", "swim", "walk"}  # not while sitting, standing ...
KINDS = {word: kind for kind, words in _entries(OTHER_THINGS) for word in words.split()}
KINDS |= dict.fromkeys(SETS["names"], "idea")
KINDS |= {word: senses[0].kind for word, senses in SENSES.items() if word not in KINDS}
NOUN_FORMS = {_plural(word): (word, "S") for word in KINDS}
NOUN_FORMS |= {word: (word, "N") for word in KINDS if word not in SETS["plural only"]}
VERB_FORMS = {
    _inflect(verb, form): (verb, form) for verb in ACTS.split() for form in "BZG" if verb != "park"
}
DIMENSIONS = {
    word.lstrip("~"): n for n, (_, group) in enumerate(_rows(VALUES)) for word in group.split()
}
LEMMAS = {form: lemma for form, (lemma, _) in (VERB_FORMS | NOUN_FORMS).items()}
SAME: dict[str, set[str]] = defaultdict(set)  # what a word bars, as it means the same
for _senses in (*SENSES.values(), *VALUE_SENSES.values()):
    for _new, _same in itertools.chain.from_iterable(sense.choices for sense in _senses):
        for _name in _same:
            SAME[_name].add(_new)
VALUE_WORDS = {*VALUE_SENSES, *NUMBERS, *YOUNGER, "several", "multiple"}
ADJECTIVES = {*VALUE_SENSES, *YOUNGER, *OTHER_VALUES.split()}
FUNCTION = {word: tag for tag, words in _entries(FUNCTION_WORDS) for word in _names(words)}
FUNCTION |= dict.fromkeys(RELATION_ROWS, "P") | dict.fromkeys(NUMBERS, "M")
COMPOUNDS: dict[str, dict[str, list[list[str]]]] = defaultdict(dict)  # by their first two words
for _name in sorted({*NOUN_FORMS, *FUNCTION}, key=lambda name: (-len(name), name)):
    if " " in _name:
        _first, _second = _name.split()[:2]
        COMPOUNDS[_first].setdefault(_second, []).append(_name.split())


# Reading a caption


@dataclass(slots=True, eq=False)
class Token:
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


@dataclass(slots=True, eq=False)
class Phrase:
    """A noun phrase: token indices of its first word, past its last word, and of its head."""

    first: int
    stop: int
    head: int
    kind: str = ""  # of thing that it names, "" if unknown; a group of dogs is an animal


Context = tuple[str, str, str, str]


@dataclass(slots=True, eq=False)
class Sentence:
    """A caption that has been read; ``named`` are the words that no negative may bring in."""

    caption: str
    tokens: list[Token]
    phrases: list[Phrase]
    starts: dict[int, Phrase]  # phrases by first token
    own: frozenset[str]  # its words, as they are and in dictionary form
    named: Set[str]
    barred: Set[str]  # these, and what means the same
    contexts: list[Context]  # of each token its neighbours, see Slots
    movers: dict[int, tuple[str, str]] = field(default_factory=dict)  # by relation, see _mover


WORD = re.compile("[^\\W_]+(?:['\u2019-][^\\W_]+)*|[^\\w\\s]|_")


def _read(caption: str, forbidden: frozenset[str] = frozenset()) -> Sentence | None:
    """Tag and chunk a caption; None if it is not English."""
    words = _split(caption)
    tokens: list[Token] = []
    for i, (word, start, end) in enumerate(words):
        following = words[i + 1][0] if i + 1 < len(words) else ""
        if following == "and" and i + 2 < len(words) and _alike(word, words[i + 2][0]):
            following = words[i + 2][0]  # an orange and red train
        tag, lemma = FUNCTION.get(word), word
        if tag is None:
            tag, lemma = _tag(word, tokens[-1] if tokens else None, following)
        if tag in "EA" and tokens and _joined(tokens[-1], word, following):
            tokens[-1].tag = tag = "A"
        tokens.append(Token(word, start, end, tag, lemma))
    return _sentence(caption, tokens, _chunk(tokens), forbidden)


def _sentence(
    caption: str, tokens: list[Token], phrases: list[Phrase], forbidden: frozenset[str]
) -> Sentence | None:
    """A caption that has been tagged and chunked; None if it is not English."""
    tags = "".join([t.tag for t in tokens])
    spoken = len(tags) - tags.count(".")
    if 2 * (spoken - len(re.findall("[XUE]", tags))) <= spoken:
        return None
    starts = {p.first: p for p in phrases}
    for phrase in reversed(phrases):
        phrase.kind = KINDS.get(tokens[phrase.head].lemma, "")
        inner = starts.get(phrase.head + 2)
        if inner and phrase.kind in HOLDERS and tokens[phrase.head + 1].word == "of":
            phrase.kind = inner.kind or phrase.kind
    none: frozenset[str] = frozenset()
    own = frozenset([t.word for t in tokens] + [t.lemma for t in tokens])
    sentence = Sentence(caption, tokens, phrases, starts, own, none, none, _contexts(tokens))
    return _forbid(sentence, forbidden)


def _contexts(tokens: Sequence[Token]) -> list[Context]:
    """Of each token the keys of the four tables."""
    n = len(tokens)
    words = ["^", *(t.word for t in tokens), "$"]
    content = [t.tag not in "DMIRA." for t in tokens]
    ahead, behind = ["^"] * n, ["$"] * n
    for i in range(1, n):
        ahead[i] = words[i] if content[i - 1] else ahead[i - 1]
        behind[n - 1 - i] = words[n + 1 - i] if content[n - i] else behind[n - i]
    return list(zip(words, words[2:], ahead, behind, strict=False))


def _forbid(sentence: Sentence, words: Iterable[str]) -> Sentence:
    """The same caption, with more words that no negative may bring in."""
    named = {*words, *sentence.named, *sentence.own}
    named.update([LEMMAS[w] for w in named if w in LEMMAS])
    barred = named.union(*[SAME[w] for w in named if w in SAME])
    return replace(sentence, named=named, barred=barred)


def _facts(sentence: Sentence) -> set[str]:
    """What a caption says of its image that no negative of another caption may say."""
    facts = {t.word for t in sentence.tokens if t.word not in RELATION_ROWS}
    for word in [w for w in facts if not w.isalpha()]:  # a man's, black-and-white
        facts.update(part for part in re.split("[^\\w]", word) if part not in RELATION_ROWS)
    facts.update(LEMMAS[w] for w in list(facts) if w in LEMMAS)
    for i, token in enumerate(sentence.tokens):
        phrase = sentence.starts.get(i + 1) or sentence.starts.get(i)
        if phrase and (token.word in NUMBERS or token.word in SETS["vague numbers"]):
            facts.add(f"{token.word} {sentence.tokens[phrase.head].lemma}")
        phrase = sentence.starts.get(i + 1)
        if phrase and token.word in RELATION_ROWS:
            for relation in SAME_RELATIONS.get(token.word, (token.word,)):
                facts.add(f"{relation} {sentence.tokens[phrase.head].lemma}")
                facts.add(f"{relation} {phrase.kind}")
    return facts


def _split(caption: str) -> list[tuple[str, int, int]]:
    """Words and marks with their offsets; a compound of the tables is one word."""
    found = itertools.islice(WORD.finditer(caption), MAX_WORDS)
    marks = [(m[0].lower(), *m.span()) for m in found]
    words, i = [], 0
    while i < len(marks):
        word, start, end = marks[i]
        size = 1
        if word in COMPOUNDS and i + 1 < len(marks):
            for name in COMPOUNDS[word].get(marks[i + 1][0], ()):
                run, whole = marks[i : i + len(name)], " ".join(name)
                if [w for w, _, _ in run] == name and run[-1][2] - start == len(whole):
                    word, end, size = whole, run[-1][2], len(name)
                    break
        words.append((word, start, end))
        i += size
    return words


def _tag(word: str, previous: Token | None, following: str) -> tuple[str, str]:
    """Part of speech and dictionary form of a word of content between its neighbours."""
    before = previous.tag if previous else ""
    nounish = following in NOUN_FORMS or following in ADJECTIVES
    if word in PARTICIPLE_ACTS and not nounish:
        return "E", word
    acts = VERB_FORMS.get(word, ("", ""))[1] == "G"
    if (
        word in ADJECTIVES
        and not acts
        and (nounish or (word not in NOUN_FORMS and (word not in VERB_FORMS or before == "I")))
    ):
        return "A", word
    if word in VERB_FORMS and _acts_here(word, previous, following, nounish):
        return VERB_FORMS[word][::-1]
    if word in NOUN_FORMS:
        return NOUN_FORMS[word][::-1]
    if word in VERB_FORMS and VERB_FORMS[word][1] == "G":
        return "A", word  # a smiling man
    return _guess(word, before), word


def _alike(one: str, two: str) -> bool:
    """Whether two words are values of one dimension, such as colours."""
    return one in DIMENSIONS and DIMENSIONS[one] == DIMENSIONS.get(two)


def _joined(previous: Token, word: str, following: str) -> bool:
    """Whether a noun and a participle describe the next noun: a snow covered slope."""
    joined = previous.tag == "N" and word.endswith(("ed", "eaten")) and word not in PARTICIPLE_ACTS
    return joined and (following in NOUN_FORMS or following in ADJECTIVES)


def _acts_here(word: str, previous: Token | None, following: str, nounish: bool) -> bool:
    """Whether a word that can be a verb is one here."""
    lemma, form = VERB_FORMS[word]
    before = previous.tag if previous else ""
    if form == "G" and word in NOUN_FORMS:
        return before in ("N", "S") and FUNCTION.get(following) == "D"
    if lemma == "look" and form == "G" and nounish:
        return False  # a tasty looking cake
    if form == "G":
        modifies = before in ("D", "M", "A") or (
            previous and previous.word in ("with", "of", "for", "on", "in", "near", "next to")
        )
        return not (modifies and nounish)
    if before in ("Q", "I") or (previous and previous.word == "to"):
        return form == "B" or before == "Q"
    if word not in NOUN_FORMS:
        return before in (
            ("S", "R", "C", "E") if form == "B" else ("N", "S", "X", "R", "C", "E")
        ) or (before == "X" and previous is not None and previous.word.endswith("s"))
    if (
        form == "Z"
        and lemma not in SENSES
        and KINDS.get(lemma) != "measure"
        and following in SETS["after acts"]
    ):
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


# Four editors: each proposes every edit that is safe


class Part(NamedTuple):
    """New text in the place of tokens first..last; ``words`` are its first, last and head word."""

    first: int
    last: int
    new: str
    words: tuple[str, str, str]
    moved: bool = False  # from another place of the caption, with its capitals


Candidate = tuple[Part, ...]
NONE: Candidate = ()  # rather no negative than one that its words give away


def _put(first: int, last: int, new: str) -> Candidate:
    """The candidate that writes one word or compound."""
    return (Part(first, last, new, (new, new, new)),)


def _put_act(first: int, last: int, new: str) -> Candidate:
    """The candidate that writes an act, and perhaps a relation after it."""
    act, _, relation = new.partition(" ")
    return (Part(first, last, new, (act, relation or act, act)),)


def _relation(sentence: Sentence, slots: Slots | None) -> list[Candidate]:
    """Turn a relation into what contradicts it, or let its two sides change places."""
    found = _swaps(sentence) + _but_no(sentence, -1)
    for i, token in enumerate(sentence.tokens):
        if token.word in RELATION_ROWS:
            found += [_put(i, i, new) for new in _contradictions(sentence, i, slots)]
            found += _neither(sentence, i)
        if token.word in SETS["listing"]:
            found += _but_no(sentence, i)
    return found or _apart(sentence)


def _apart(sentence: Sentence) -> list[Candidate]:
    """Somebody without or next to what the caption lets them hold, wear, ride ..."""
    tokens, found = sentence.tokens, []
    for i, token in enumerate(tokens):
        phrase = sentence.starts.get(i + 1)
        before = tokens[i - 1].tag if i else "I"
        if token.lemma not in APART or token.tag not in "GZB" or not phrase:
            continue
        free = before in "NSX" or (before == "I" and token.tag == "G")
        after = tokens[phrase.stop] if phrase.stop < len(tokens) else token
        aims = after.word in SETS["aims"] or after.tag in "EA" or _held(sentence, phrase)
        aims |= token.tag != "G" and "," in sentence.own
        free &= not aims and _taken_off(sentence, phrase)
        if free and _subject(sentence, i) in MOVERS[:2]:
            found += [
                _put(i, i, new)
                for new in APART[token.lemma]
                if new not in sentence.named
                and (new != "without" or (before != "I" and _can_lack(sentence, phrase)))
                and _kind(phrase) not in ("body", "idea", "part", "feat")
                and tokens[phrase.head].lemma not in SETS["weather"]
                and (_kind(phrase) or tokens[phrase.first].tag in "DM")
            ]
        found += _neither(sentence, i) if token.lemma == "wear" else []
    return found


def _neither(sentence: Sentence, i: int) -> list[Candidate]:
    """All the things of a list are missing: without a sink, window or door."""
    tokens, verb = sentence.tokens, sentence.tokens[i]
    worn = verb.lemma == "wear" or verb.word == "in"
    if not (worn or verb.word == "with") or not _may_turn(tokens, i) or "without" in sentence.named:
        return []
    things, last = _listed(sentence, i + 1)
    if not last or not all(_missed(sentence, phrase, worn) for phrase in things):
        return []
    after = tokens[things[-1].stop] if things[-1].stop < len(tokens) else None
    if after and (after.tag not in ".P" or after.word in (",", "of")):
        return []
    return [_put(i, i, "without") + _put(last, last, "or")]


def _listed(sentence: Sentence, k: int) -> tuple[list[Phrase], int]:
    """The phrases of a list from token k on, and where its "and" is; 0 if it has none."""
    things: list[Phrase] = []
    last = 0
    while phrase := sentence.starts.get(k):
        things.append(phrase)
        k = phrase.stop
        if last:
            return things, last
        k += _word(sentence, k) == "," and _word(sentence, k + 1) == "and"
        last = k if _word(sentence, k) == "and" else 0
        if not last and _word(sentence, k) != ",":
            break
        k += 1
    return things, 0


def _missed(sentence: Sentence, phrase: Phrase, worn: bool) -> bool:
    """Whether a thing of a list can be said to be missing, or not to be worn."""
    first, kind = sentence.tokens[phrase.first], _kind(phrase)
    if not kind or phrase.stop - phrase.first > 3 or first.word in SETS["not lacked"]:
        return False
    if first.tag == "M" or kind in ("body", "idea", "part"):
        return False
    if worn and not (kind.startswith("clothing") and _taken_off(sentence, phrase)):
        return False
    mass = SENSES.get(sentence.tokens[phrase.head].lemma, [NO_SENSE])[0].mass
    return first.word not in ("a", "an") or not mass  # a cheese and meat sandwich


def _but_no(sentence: Sentence, i: int) -> list[Candidate]:
    """The second of two things after relation i is missing: with a stove but no oven."""
    tokens, phrase = sentence.tokens, sentence.starts.get(i + 1)
    held = i > 0 and tokens[i].word == "of" and KINDS.get(tokens[i - 1].lemma) in HOLDERS
    if i >= 0 and tokens[i].word == "of" and not held:
        return []
    if i < 0 and (SETS["plural subject"] & sentence.own or any(t.tag in "IZB" for t in tokens)):
        return []  # a man but no woman play together
    other = sentence.starts.get(phrase.stop + 1) if phrase else None
    if phrase and other:
        shared = tokens[phrase.first].word == "the" and tokens[other.first].tag not in "DM"
        if shared or tokens[other.head].lemma == tokens[phrase.head].lemma:
            return []  # the tv and video remotes
    if phrase and _word(sentence, phrase.stop) == "and":
        return _no(sentence, phrase.stop, other)
    return []


def _no(sentence: Sentence, k: int, phrase: Phrase | None) -> list[Candidate]:
    """But no, for the "and" at k and the article after it, if the sentence ends there."""
    if phrase is None or phrase.stop - phrase.first > 3:
        return []
    first, kind = sentence.tokens[phrase.first], _kind(phrase)
    plain = first.word in ("a", "an") or first.tag in "NS"
    last = k + (first.word in ("a", "an"))
    ends = _word(sentence, phrase.stop) in (".", "in", "on", "next to", "near", "at")
    if kind in ("body", "idea", "part") or not plain or not ends:
        return []
    if last == k and (not kind or phrase.stop - phrase.first > 1):
        return []  # a steak and vegetable meal
    return [(Part(k, last, "but no", ("but", "no", "no")),)]


def _contradictions(sentence: Sentence, i: int, slots: Slots | None) -> list[str]:
    """What contradicts relation i, as far as its neighbours allow."""
    tokens, phrase = sentence.tokens, sentence.starts.get(i + 1)
    relation = tokens[i].word
    if not _may_turn(tokens, i) or _stuck(sentence, i, phrase):
        return []
    if i and tokens[i - 1].lemma in SETS["looks"]:
        return ["away from"] if relation == "at" and phrase else []
    kind, noun = _other_side(sentence, i)
    if _needed(sentence, i, kind, noun):
        return []
    its = _word(sentence, i + 1) in PRONOUN_KINDS
    named = phrase is not None or its
    if relation == "in" and phrase and not _taken_off(sentence, phrase):
        return []
    if relation == "full of" and _mover(sentence, i)[0].startswith("place"):
        return []  # a city full of buildings
    thing = relation in SETS["lacking"] or kind not in ("idea", "picture", "feat")
    fits = (thing and phrase is not None) or its or relation in SETS["lonely"]
    rows = RELATION_ROWS[relation]
    targets = next((t for kinds, t in rows if _matches(kind, kinds) or (fits and not kinds)), [])
    whole = relation not in ("has", "have") or tokens[0].word in ("a", "an")
    if targets and relation in SETS["lacking"] and whole and _has(sentence, i):
        targets = ["without"]
    barred = set() if _can_lack(sentence, phrase) else {*SETS["lackings"]}
    if sentence.own & SETS["in play"]:
        barred |= {"after", "before"}  # the game in which they serve
    return [
        t
        for t in targets
        if t not in sentence.named
        and t not in barred
        and (named or t not in RELATION_ROWS or t in SETS["lonely"] or t == "underneath")
        and f"{t} {noun}" not in sentence.named
        and f"{t} {kind}" not in sentence.named
        and not _may_hold(sentence, i, t, kind, noun)
        and (_can_be(sentence, i, t, kind, noun) or _seen(sentence, i, t, slots))
    ]


def _taken_off(sentence: Sentence, phrase: Phrase) -> bool:
    """Whether a phrase is no garment, or one that people are photographed without."""
    if not phrase.kind.startswith("clothing"):
        return True
    inner = sentence.tokens[phrase.first : phrase.head]
    covers = phrase.kind in ("clothing.top", "clothing.leg")
    loose = not covers or sentence.tokens[phrase.head].lemma in SETS["taken off"]
    return loose and all(t.tag in "DN" for t in inner)


def _other_side(sentence: Sentence, i: int) -> tuple[str, str]:
    """Kind and noun of what stands after relation i; "it" for a pronoun, "?" for the unknown."""
    phrase = sentence.starts.get(i + 1)
    if phrase is None:
        return PRONOUN_KINDS.get(_word(sentence, i + 1), ""), ""
    kind = _kind(phrase)
    if not kind and sentence.tokens[phrase.first].tag in "DM":
        kind = "?" if _word(sentence, phrase.stop) != "of" else ""
    return kind, sentence.tokens[phrase.head].lemma


def _stuck(sentence: Sentence, i: int, phrase: Phrase | None) -> bool:
    """Whether what stands around relation i holds it: out in the rain, the sun over a city."""
    tokens, relation = sentence.tokens, sentence.tokens[i].word
    if not sentence.own.isdisjoint(("sun", "moon", "only")) or (
        i and tokens[i - 1].lemma == "pass"
    ):
        return True
    if relation.startswith(("out", "in")) and not sentence.own.isdisjoint(("rain", "snow")):
        return True
    if _open(sentence, i):
        return True
    if relation in SETS["lonely"] and relation in SETS["airy"]:
        raised = i > 0 and tokens[i - 1].tag == "P"  # chin up in the air
        return raised or (i + 1 < len(tokens) and tokens[i + 1].tag in "PC")  # in the sky over
    if phrase:
        return _stuck_to(sentence, i, phrase)
    if _word(sentence, i + 1) != "it":
        return False
    owned = any(t.word in ("has", "have") for t in tokens[:i])  # has windows on it
    return owned or _mover(sentence, i)[0] in ("", "picture", "idea", "part")


def _open(sentence: Sentence, i: int) -> bool:
    """Whether a picture cannot tell relation i from its opposite, or the opposite never is."""
    relation, kind = sentence.tokens[i].word, _mover(sentence, i)[0]
    if relation == "on the wall":
        return not sentence.own.isdisjoint(("up", "hang", "hung", "mounted"))
    if relation == "in the background":
        return not sentence.own.isdisjoint(SETS["horizon"])
    if relation == "in the air":  # or near the ground
        return kind not in ("vehicle.air", "gear.ball", "animal.bird")
    if relation in ("outside", "inside"):
        return not sentence.own.isdisjoint(("street", "road", "sidewalk"))
    return relation == "through the air" or (
        relation in ("into", "on the ground", "to", "up to") and kind.startswith("vehicle")
    )


def _stuck_to(sentence: Sentence, i: int, phrase: Phrase) -> bool:
    """Whether relation i and the thing after it belong together."""
    tokens, relation, noun = sentence.tokens, sentence.tokens[i].word, sentence.tokens[phrase.head]
    before = tokens[i - 1] if i else Token("", 0, 0, "", "")
    if _kind(phrase) == "body" or (relation == "in" and "another" in sentence.own):
        return True  # hands on his hips, in one pan and in another
    if relation == "in" and _kind(phrase).startswith("clothing"):
        described = phrase.stop - phrase.first > 2 or tokens[phrase.first].word == "the"
        person = _mover(sentence, i)[0].startswith("person")
        return described or not person or before.tag in ("G", "Z", "B")  # standing in a shirt
    if phrase.stop < len(tokens):
        following = tokens[phrase.stop]
        if relation == "across" and following.word == "from":
            return True
        if before.lemma in SETS["looks"] and following.tag == "B":
            return True  # looking at a boat cross a river
    return noun.lemma in SETS["idioms"] or (relation == "in" and noun.lemma == "mirror")


def _needed(sentence: Sentence, i: int, kind: str, noun: str) -> bool:
    """Whether the rest of the sentence needs relation i: surfing on a board, a train on tracks."""
    tokens, relation = sentence.tokens, sentence.tokens[i].word
    if relation not in SETS["needed"]:
        return False
    ridden = ("vehicle", "gear", "animal")
    if i and tokens[i - 1].lemma in SETS["steered"] and _matches(kind, ridden):
        return True
    if kind in ("device.hand", "gear.ski") or noun in ("track", "train track", "railroad track"):
        return True
    if relation in ("outside", "inside") and i + 1 < len(tokens) and tokens[i + 1].tag == "P":
        return True
    if i > 1 and tokens[i - 2].lemma in SETS["looks"] and tokens[i - 1].tag in "RP":
        return True
    after = next(
        (tokens[p.stop] for p in sentence.phrases if p.first == i + 1 < p.stop < len(tokens)), None
    )
    if after and after.lemma in SETS["steered"] and _matches(kind, ridden):
        return True  # on scooters riding
    owned = _word(sentence, i + 1) in SETS["possessive"] and _matches(kind, ("vehicle", "gear"))
    return owned or (
        kind == "gear.board" and any(t.tag in "GZBEU" and t.lemma not in POSTURES for t in tokens)
    )


def _has(sentence: Sentence, i: int) -> bool:
    """Whether what stands before relation i is a place or a thing that has parts."""
    before = KINDS.get(sentence.tokens[i - 1].lemma, "") if i else ""
    return _matches(before, ("place", "furniture", "structure", "vehicle", "fixture", "picture"))


def _can_be(sentence: Sentence, i: int, new: str, kind: str, noun: str) -> bool:
    """Whether something can be on, in, under ... this thing, and that what is named before."""
    tokens, phrase = sentence.tokens, sentence.starts.get(i + 1)
    if new in ("without", "lacking", "free of") or phrase is None:
        return True
    first, plural = tokens[phrase.first], tokens[phrase.head].tag == "S"
    if first.tag not in "DM" and not plural and not SENSES.get(noun, [NO_SENSE])[0].mass:
        return False  # on television
    known = first.word == "the" or plural or kind in ("person.adult", "person.group")
    far = known and first.word != "some" and kind != "place.land"
    if (new == "far from" and not far) or noun not in SETS.get(f"can be {new}", {noun}):
        return False  # nobody writes "far from a hill"
    if new == "in the middle of" and noun in SETS["vague"] | {"hill"}:
        return False
    if new not in GROUNDS:
        return _around(sentence, i, new, kind, noun)
    if tokens[i].word not in GROUNDS and _goes_on(sentence, phrase):
        return False  # in a tree and a lake
    return _grounded(sentence, i, new, kind, noun)


def _goes_on(sentence: Sentence, phrase: Phrase) -> bool:
    """Whether a phrase is the first of a list: a bowl of soup and a glass."""
    if _word(sentence, phrase.stop) == "of":
        phrase = sentence.starts.get(phrase.stop + 1, phrase)
    return _word(sentence, phrase.stop) in ("and", ",")


def _grounded(sentence: Sentence, i: int, new: str, kind: str, noun: str) -> bool:
    """Whether something can be on, in or under this thing, and do there what it does."""
    old, (mover, act) = sentence.tokens[i].word, _mover(sentence, i)
    if (noun in SETS["either"] and old in GROUNDS) or (new == "under" and noun in SETS["low"]):
        return False  # on a boat, in a boat
    person = mover.startswith("person")
    vague = kind == "place.land" or (kind == "nature.tree" and new == "under")
    if vague and old not in GROUNDS:
        return False  # near some grass may be on it, near a tree under it
    if kind.startswith("vehicle") and _handled(sentence, i):
        return False  # checks her phone on a bus
    if (old == "at" and not person) or (old == "over" and person):
        return False  # what is at a table is on it
    if act in SETS["swum"] and kind != "place.water":
        return False
    if act in MOVES and not kind.startswith("place"):
        return False  # walking on a chair
    if act == "stand" and kind.startswith("animal"):
        return False
    return any(
        _matches(mover, who) and (noun in what or _matches(kind, what))
        for who, what in GROUNDS[new]
    )


def _handled(sentence: Sentence, i: int) -> bool:
    """Whether what stands before relation i is the object of a verb."""
    phrase = next((p for p in reversed(sentence.phrases) if p.stop == i), None)
    return bool(phrase and phrase.first and sentence.tokens[phrase.first - 1].tag in "GZB")


def _mover(sentence: Sentence, i: int) -> tuple[str, str]:
    """Kind of what stands before relation i, and what it does there."""
    if i not in sentence.movers:
        phrase = next((p for p in reversed(sentence.phrases) if p.stop <= i), None)
        between = sentence.tokens[phrase.stop if phrase else 0 : i]
        act = next((t.lemma for t in between if t.tag in "GZB"), "")
        sentence.movers[i] = _kind(phrase), act
    return sentence.movers[i]


def _around(sentence: Sentence, i: int, new: str, kind: str, noun: str) -> bool:
    """Whether something can be next to, behind, far from ... this thing."""
    if noun == "water" and sentence.tokens[i + 1].word == "the":
        return True
    if noun in SETS["never beside"] or not _matches(kind, AROUND.get(new, kind).split()):
        return False
    mover = _mover(sentence, i)[0]
    seated = mover.startswith("person") and (kind == "device.desk" or noun == "podium")
    lost = not mover and sentence.tokens[i].word in GROUNDS
    faces = not (seated or lost or noun in SETS["surfaces"])
    return faces or new not in ("behind", "in front of")


def _may_hold(sentence: Sentence, i: int, new: str, kind: str, noun: str) -> bool:
    """Whether a new relation may hold as well as relation i, or makes no sense beside it."""
    if i + 1 not in sentence.starts:
        return False
    tokens, (mover, act) = sentence.tokens, _mover(sentence, i)
    standing = next((p for p in sentence.phrases if p.stop == i and p.first), None)
    if standing and tokens[standing.first - 1].word in SETS["placing"] >= {new}:
        return True  # by the water in the grass, on a floor on a rack
    if new in GROUNDS or new in SETS["lackings"]:
        return new == "in" and noun == "window"
    swum = {tokens[i - 1].lemma, act} & SETS["swum"] or SETS["boarded"] & sentence.own
    wet = (kind == "place.water" or noun == "river") and (swum or mover == "vehicle.water")
    if wet or (tokens[i].word in SETS["placing"] and _vague(kind, noun, new, mover, act)):
        return True  # swimming next to a pond
    if kind.startswith(("furniture", "container", "device")) and _handled(sentence, i):
        return True  # cutting a cake on a table, behind a table
    if new == "far from":
        return act in MOVES
    if noun == "water" or (act in ("eat", "graze", "feed") and not kind.startswith("place")):
        return True
    own = tokens[i + 1].word in SETS["possessive"]
    if mover.startswith("home") and (own or new == "outside"):
        return True  # a clock behind its tower
    if new in ("behind", "in front of"):
        served = mover.startswith(("food", "container", "drink"))
        return served and kind in ("furniture.top", "container.plate")
    bare = [t.word for t in tokens[i + 1 : i + 3]] == ["a", "room"]
    return new == "outside" and (own or bare)


def _vague(kind: str, noun: str, new: str, mover: str, act: str) -> bool:
    """Whether what is on or in a thing can also be said to be near to it, or far from it."""
    close = new in ("next to", "beside", "by", "near")
    if noun == "traffic" or (close and noun in SETS["vague"]):
        return True  # who is in the woods is next to them
    if kind == "place.road":  # what stands on a street may well be beside it
        walks = mover.startswith("animal") and act in MOVES
        return new == "far from" or (close and not walks)
    if kind == "place.land":
        return close
    return kind == "place.ground" and mover.startswith("structure")  # a fence in a field


def _seen(sentence: Sentence, i: int, new: str, slots: Slots | None) -> bool:
    """Whether the captions have this relation between the same two words of content."""
    before = [p for p in sentence.phrases if p.stop <= i]
    noun = sentence.tokens[sentence.starts[i + 1].head].lemma if i + 1 in sentence.starts else ""
    if slots is None or not before or not noun or noun in NEVER.get(new, ()):
        return False
    first = sentence.tokens[i + 1]
    listed = _goes_on(sentence, sentence.starts[i + 1])
    fixed = ("clothing", "animal", "nature.tree", "food", "container")
    if noun in SETS["perches"] or listed or _kind(sentence.starts[i + 1]).startswith(fixed):
        return False  # birds may sit in trees and on fences, cows not
    if first.tag not in "DM" or (noun in SETS["either"] and sentence.tokens[i].word in GROUNDS):
        return False
    mover, kind = _kind(before[-1]), _kind(sentence.starts[i + 1])
    if kind.startswith("place") and new in ("behind", "in front of"):
        return False
    if not kind or mover.startswith("vehicle") or not _matches(mover, (*SEEN, *HANDLED)):
        return False
    _, _, ahead, behind = sentence.contexts[i]
    if behind != sentence.tokens[sentence.starts[i + 1].head].word:
        return False
    return slots.counted(2, ahead, new) > 1 and slots.counted(3, behind, new) > 1


def _may_turn(tokens: list[Token], i: int) -> bool:
    """Whether a relation is free, and no part of an idiom."""
    if i == 0:
        return tokens[0].word != "to"  # Two is often written so
    before, relation = tokens[i - 1], tokens[i].word
    fixed = (
        before.tag == "D"
        or before.word == "being"
        or before.lemma in SETS.get(f"fixed {relation}", ())
    )
    if fixed or (relation in ("with", "on") and _tied(before)):
        return False
    if relation.startswith("the "):
        return True
    if relation == "by" and any(
        t.tag == "E" and t.word not in SETS["placed"] for t in tokens[max(i - 3, 0) : i]
    ):
        return False  # ridden by a man
    if relation in LED:
        return before.tag in "GZB" and (not LED[relation] or before.lemma in LED[relation])
    if relation == "together":
        return before.lemma in POSTURES
    if relation == "with" and before.tag in "GZB":
        return before.lemma in SETS["alone"]
    if relation in ("with", "by", "without", "between"):
        return before.tag in "NSX" or before.lemma in POSTURES or before.word in SETS["placed"]
    return before.tag != "P" or before.word in ("around", "down", "up", "over", "outside", "off")


def _tied(before: Token) -> bool:
    """Whether a word takes "with" or "on" to itself: on the back on a scooter, snuggles with."""
    if before.tag == "X" and before.word.endswith("s"):
        return True
    return KINDS.get(before.lemma) in ("part", "body") or before.lemma in SETS["joined"]


def _can_lack(sentence: Sentence, phrase: Phrase | None) -> bool:
    """Whether "without" and the like can stand before a phrase: a plain thing, and no list."""
    if phrase is None or phrase.stop - phrase.first > 3:
        return False
    first, kind = sentence.tokens[phrase.first], _kind(phrase)
    counted = any(t.tag == "M" for t in sentence.tokens[phrase.first : phrase.stop])
    if not kind or kind in ("body", "idea", "part") or counted:
        return False
    if sentence.tokens[phrase.head].lemma in SETS["floors"]:
        return False
    after = sentence.tokens[phrase.stop :]
    if after and (after[0].tag in "ADMRE" or (after[0].tag == "G" and kind[:8] != "clothing")):
        return False  # with the door open, with a couch a table, with a man swinging
    named = first.tag == "X" and sentence.caption[first.start].isupper()  # Williams Street
    goes_on = after and (after[0].word == "," or after[0].word in SETS["described"])
    return not (named or goes_on or first.word in SETS["not lacked"])


def _swaps(sentence: Sentence) -> list[Candidate]:
    """Every way to let a subject and what it acts on or stands on change places."""
    whole: list[Phrase] = []  # "a group of men" is one, "a picture of a man" two
    for phrase in sentence.phrases:
        last = whole[-1] if whole else phrase
        shown = KINDS.get(sentence.tokens[last.head].lemma) == "picture"
        if last.stop + 1 == phrase.first and _word(sentence, last.stop) == "of" and not shown:
            whole[-1] = replace(last, stop=phrase.stop)
        else:
            whole.append(phrase)
    found = []
    kinds = [_kind(phrase).partition(".")[0] for phrase in whole]
    for k, one in enumerate(whole):
        for two, kind in zip(whole[k + 1 : k + 4], kinds[k + 1 :], strict=False):
            alike = kinds[k] in SWAPS and kind in SWAPS[kinds[k]][0].split()
            if alike and _asymmetric(sentence, one, two, *SWAPS[kind][1:]):
                found.append(_swap(sentence, one, two))
    return [swap for swap in found if swap]


def _asymmetric(
    sentence: Sentence, one: Phrase, two: Phrase, acts: set[str], places: set[str]
) -> bool:
    """Whether the words between two phrases make a sentence false once these change places."""
    tokens = sentence.tokens
    middle = tokens[one.stop : two.first]
    if not 0 < len(middle) <= 6 or tokens[one.head].lemma == tokens[two.head].lemma:
        return False
    if any(t.tag in "CQ." and t.word not in SETS["links"] for t in middle):
        return False  # never across "and"
    verbs = [t for t in middle if t.tag in "GZBEU" and t.lemma not in POSTURES]
    governed = one.first > 0 and tokens[one.first - 1].tag in "PGZB"
    if len(verbs) > 1 or governed:
        return False
    if verbs and verbs[0] != middle[-1] and verbs[0].lemma not in SETS["looks"]:
        return False
    fits = verbs[0].lemma in acts if verbs else middle[-1].word in places
    return fits and _movable(sentence, one) and _movable(sentence, two)


def _movable(sentence: Sentence, phrase: Phrase) -> bool:
    """Whether a phrase names a thing, stands alone, and says "his" of nobody."""
    around = sentence.tokens[max(phrase.first - 1, 0) : phrase.stop + 1]
    if around[-1].tag in "EA" and phrase.stop < len(sentence.tokens):
        return False  # snow covered
    if sentence.tokens[phrase.head].lemma in SETS["floors"]:
        return False
    return sentence.tokens[phrase.first].word not in SETS["possessive"] and not any(
        t.word in ("and", ",") for t in around
    )


def _swap(sentence: Sentence, one: Phrase, two: Phrase) -> Candidate:
    """Let two phrases change places; the verb after the first agrees with its new subject."""
    caption, tokens = sentence.caption, sentence.tokens
    spans = [(tokens[p.first].start, tokens[p.stop - 1].end) for p in (one, two)]
    first, second = (caption[start:end] for start, end in spans)
    numbers = [
        "" if KINDS.get(tokens[p.head].lemma) in HOLDERS[:2] else tokens[p.head].tag
        for p in (one, two)
    ]
    verb = tokens[one.stop + (tokens[one.stop].tag == "Q")]
    parts: list[Part] = []
    if not all(numbers) or numbers[0] != numbers[1]:
        if one.first and tokens[one.first - 1].tag == "I":
            return ()  # there is a man ...
        if verb.tag in "IZB":
            form = AGREEMENT.get(verb.word, "")
            if verb.tag != "I":
                form = _inflect(verb.lemma, "B" if verb.tag == "Z" else "Z")
            if not all(numbers) or not form:
                return ()
            parts += _put(tokens.index(verb), tokens.index(verb), form)
    initial = first.split()[0]
    raised = initial[0].isupper() and (len(initial) == 1 or not initial.isupper())
    if raised and not caption.isupper() and tokens[one.first].tag != "X":
        first, second = first[0].lower() + first[1:], second[0].upper() + second[1:]
    words = [
        (tokens[p.first].word, tokens[p.stop - 1].word, tokens[p.head].word) for p in (one, two)
    ]
    return (
        Part(one.first, one.stop - 1, second, words[1], moved=True),
        *parts,
        Part(two.first, two.stop - 1, first, words[0], moved=True),
    )


def _attribute(sentence: Sentence, slots: Slots | None) -> list[Candidate]:
    """Give a thing another value of the same dimension, or two things the other's."""
    tokens = sentence.tokens
    sites = [i for i, t in enumerate(tokens) if t.tag in "AM" and t.word in VALUE_WORDS]
    found = [_put(i, i, new) for i in sites for new in _values(sentence, i)]
    for k, i in enumerate(sites):
        for j in sites[k + 1 :]:
            if _exchangeable(sentence, i, j):
                found.append(_put(i, i, tokens[j].word) + _put(j, j, tokens[i].word))
    return found + _aged(sentence, sites) or _recounted(sentence)


def _aged(sentence: Sentence, sites: list[int]) -> list[Candidate]:
    """An elderly man instead of a young boy."""
    found: list[Candidate] = []
    for i in sites:
        noun = sentence.tokens[i + 1] if i + 1 < len(sentence.tokens) else sentence.tokens[i]
        if sentence.tokens[i].word == "young" and noun.lemma in CHILDREN:
            new = f"elderly {OTHER_AGE[noun.lemma]}"
            new = _plural(new) if noun.tag == "S" else new
            if not sentence.named & {"old", "older", *SETS["parents"], *new.split()}:
                found.append((Part(i, i + 1, new, ("elderly", new.split()[1], new.split()[1])),))
    return found


def _recounted(sentence: Sentence) -> list[Candidate]:
    """Two of what the caption is about instead of one."""
    tokens, phrase = sentence.tokens, sentence.starts.get(0)
    words = {t.word for t in tokens}
    if phrase is None or phrase.head == 0 or words & (SETS["counting"] | PRONOUNS):
        return []
    noun, stop = tokens[phrase.head], phrase.stop
    verbs = [
        i for i, t in enumerate(tokens) if (t.tag in "IZB" or t.word in AGREEMENT) and i >= stop
    ]
    near = stop + (_word(sentence, stop) in SETS["links"])
    counted = _matches(_kind(phrase), COUNTED) and noun.lemma in SENSES
    one = tokens[0].word in ("a", "an") and noun.tag == "N"
    if not counted or not one or _word(sentence, stop) in ("and", ",", "of", "or"):
        return []
    linked = near > stop and near not in verbs  # a sign that says
    linked |= any(t.tag == "X" and VERB_FORMS.get(t.word, "  ")[1] == "Z" for t in tokens[stop:])
    split = any(
        t.tag == "G" and tokens[i].tag != "I" for i, t in enumerate(tokens[1:]) if i in verbs
    )
    if linked or split or any(i != near for i in verbs):
        return []  # skate boarding
    if any(letter.isupper() for letter in sentence.caption[noun.start + 1 : noun.end]):
        return []  # a STOP sign
    plural = _plural(noun.lemma)
    edits = _put(0, 0, "two") + _put(phrase.head, phrase.head, plural)
    for i in verbs:
        new = AGREEMENT.get(tokens[i].word)
        if not new and tokens[i].tag in "IB":
            return []
        new = new or _inflect(tokens[i].lemma, "B")
        edits += _put(i, i, new)
    return [] if {"two", plural} & sentence.named else [edits]


def _article(word: str) -> str:
    """The article before a word."""
    vowel = r"(?!uni|us[ei]|usua|uten|util|uku|eu|ewe|one\b|once)[aeiou]|hour|honest|8|11\b|18\b"
    return "an" if re.match(vowel, word, re.IGNORECASE) else "a"


def _exchangeable(sentence: Sentence, i: int, j: int) -> bool:
    """Whether two values of one dimension belong to two different things."""
    tokens = sentence.tokens
    owners = [next((p for p in sentence.phrases if p.first <= k < p.stop), None) for k in (i, j)]
    if tokens[i].tag != "A" or tokens[j].tag != "A" or None in owners or owners[0] == owners[1]:
        return False
    if any(tokens[k + 1].tag in "AC" or tokens[k - 1].tag in "AC" for k in (i, j) if k):
        return False
    heads = {tokens[p.head].lemma for p in owners if p}
    first = {w for sense in VALUE_SENSES.get(tokens[i].word, ()) for w, _ in sense.choices}
    if first and tokens[j].word not in first:
        return False  # big and large
    same = DIMENSIONS.get(tokens[i].word) == DIMENSIONS.get(tokens[j].word)
    return len(heads) == 2 and same and tokens[i].word != tokens[j].word


def _values(sentence: Sentence, i: int) -> list[str]:
    """Values that exclude that of token i."""
    tokens, word = sentence.tokens, sentence.tokens[i].word
    phrase = next((p for p in sentence.phrases if p.first <= i < p.stop), None)
    head = tokens[phrase.head] if phrase else tokens[i]
    if word in (*NUMBERS, "several", "many", "multiple", "few"):
        return _numbers(sentence, i, head)
    if head.lemma in ("boy", "girl", "child", "kid") and word in (*YOUNGER, "young"):
        fits = head.lemma in CHILDREN and word in YOUNGER
        return [YOUNGER[word]] if fits and YOUNGER[word] not in sentence.named else []
    if _idiom(sentence, i, phrase, head) or _bound_value(word, _word(sentence, i + 1), head):
        return []
    kind = _kind(phrase)
    for sense in VALUE_SENSES.get(word, ()):
        if not sense.kind or _matches(kind, sense.kind.split()):
            near = SETS.get(f"near {word}", frozenset()) | _misfits(sentence, i, phrase, kind)
            return [w for w in _unnamed(sense, sentence) if w not in near]
    return []


def _misfits(sentence: Sentence, i: int, phrase: Phrase | None, kind: str) -> set[str]:
    """Values that nobody writes of this thing, or between these words."""
    misfits = {
        w for values, kinds in ONLY_VALUES if kind and not _matches(kind, kinds) for w in values
    }
    misfits.update(w for kinds, values in NEVER_VALUES if _matches(kind, kinds) for w in values)
    misfits.update(w for told, values in TOLD_VALUES if sentence.named & told for w in values)
    if i and sentence.tokens[i - 1].word in ("light", "dark", "bright", "pale", "neon"):
        misfits |= SETS["shades"]
    if phrase is None:
        misfits |= {"various", "assorted", "identical", "matching", "crowded"}
    elif sentence.tokens[phrase.head].lemma == "beach":
        misfits |= {"dirt", "gravel"}
    if any(t.word in ("with", "of", "full of", "filled with") for t in sentence.tokens[i + 1 :]):
        misfits |= {"empty", "vacant", "deserted"}  # a crowded shelf with a variety of items
    return misfits


def _numbers(sentence: Sentence, i: int, head: Token) -> list[str]:
    """Other numbers of a noun; several is three or more, but never two."""
    word = sentence.tokens[i].word
    wanted: tuple[str, ...] = NUMBERS[: 1 + (word == "many")]
    if word in NUMBERS:
        wanted = (*NUMBERS[:4], "several") if word == "two" else NUMBERS[:4]
    elif sentence.tokens[i - 1].tag == "D" or sentence.tokens[i - 1].word in ("very", "so", "too"):
        return []
    counted = head.tag == "S" and head.lemma not in SETS["plural only"]
    unsure = SETS["vague numbers"] if word in NUMBERS else (*NUMBERS, "couple")
    if any(f"{number} {head.lemma}" in sentence.named for number in unsure):
        return []  # several for another caption
    if any(t.word in NUMBERS and k != i for k, t in enumerate(sentence.tokens)) and "," in {
        t.word for t in sentence.tokens
    }:
        return []  # four elephants, two babies and two adults
    if "one" in sentence.own or head.lemma in ("half", "side", "end"):
        return []  # two phones, one open
    return [n for n in wanted if n not in sentence.named] if counted else []


def _idiom(sentence: Sentence, i: int, phrase: Phrase | None, head: Token) -> bool:
    """Whether value i is no value here: in the wild, black and white, lit up, the town square."""
    tokens, word = sentence.tokens, sentence.tokens[i].word
    following = _word(sentence, i + 1)
    before = tokens[i - 1] if i else Token("", 0, 0, "", "")
    if phrase is None and (before.tag in ("D", "N", "S", "A") or word in ("high", "low")):
        return True
    if phrase is None and word.endswith("ed") and i + 1 < len(tokens) and tokens[i + 1].tag == "P":
        return True
    if before.word == "to" and word in VERB_FORMS:
        return True  # about to cut
    if (
        "lush" in (before.word, word)
        or word == "french"
        or word in SETS.get(f"of {head.lemma}", ())
    ):
        return True
    around = [t.word for t in tokens[max(i - 2, 0) : i]], [t.word for t in tokens[i + 1 : i + 3]]
    if any(photo in around for photo in (["and", "white"], ["and", "black"], ["black", "and"])):
        return True
    if word in SETS["compared"] and sum(t.lemma == head.lemma for t in tokens) > 1:
        return True  # a vase next to a smaller vase
    if before.word in SETS["almost"] or following in SETS["particles"]:
        return True
    if word in SETS["materials"] and following.endswith("ed"):
        return True  # a brick paved street
    if word in ("open", "closed", "shut") and phrase and phrase.first:
        return tokens[phrase.first - 1].word in SETS["reached"]  # into an open box
    sexed = word in ("male", "female") and any(t.word in PRONOUNS for t in tokens)
    return sexed or KINDS.get(head.lemma) in ("measure", "idea")


def _bound_value(word: str, following: str, head: Token) -> bool:
    """Whether a value belongs to the word behind it: old fashioned, large long, little grass."""
    mass = SENSES.get(head.lemma, [NO_SENSE])[0].mass
    sizes = {word, following} <= SETS["sizes"]
    return sizes or following in SETS["after kept"] or (word == "little" and mass)


def _object(sentence: Sentence, slots: Slots | None) -> list[Candidate]:
    """Name another thing of the same kind."""
    sporty = bool(sentence.own & SETS["sporty"])  # a tennis player hits no pitch, if need be
    found = _renamed(sentence, sporty) + _other_sex(sentence) + _other_age(sentence)
    bound = sentence.own & SETS["bound to sport"]
    return found or (_renamed(sentence, False) if sporty and not bound else [])


def _renamed(sentence: Sentence, sporty: bool) -> list[Candidate]:
    """Another thing for each noun; players stay in sporty captions."""
    tokens, found = sentence.tokens, []
    for phrase in sentence.phrases:
        if sporty and _kind(phrase) in SPORTS:
            continue
        first = phrase.head
        while first > phrase.first and tokens[first - 1].tag == "N":
            first -= 1  # a kitchen counter becomes a table
        inner = tokens[first : phrase.head]
        if any(KINDS.get(t.lemma) in ("measure", "body", "part", "person.group") for t in inner):
            continue  # a lot oranges, a horn steer
        described = tokens[first - 1] if phrase.first < first < phrase.head else tokens[first]
        if described.tag == "A" and described.word not in SETS["plain values"]:
            continue  # pulled pork sandwich, wet paint sign
        first -= first > phrase.first and tokens[first - 1].tag == "X"  # a fighter jet
        if tokens[phrase.head].tag == "N" and phrase.first < first and tokens[first - 1].tag == "M":
            continue  # a two level city bus
        plural = tokens[phrase.head].tag == "S" or _many(sentence, phrase)
        for new in _things(sentence, phrase):
            found += [_put(first, phrase.head, _plural(new) if plural else new)]
    return found


def _other_age(sentence: Sentence) -> list[Candidate]:
    """A boy and a girl instead of a man and a woman, or the other way round."""
    tokens = sentence.tokens
    edits: Candidate = ()
    two = {t.lemma for t in tokens} & set(OTHER_AGE)
    if two not in ({"man", "woman"}, {"boy", "girl"}) or sentence.named & SETS["aged"]:
        return []
    if sentence.named & {OTHER_AGE[word] for word in two}:
        return []
    for i, token in enumerate(tokens):
        if token.lemma in two:
            new = OTHER_AGE[token.lemma]
            edits += _put(i, i, _plural(new) if token.tag == "S" else new)
    return [edits]


def _other_sex(sentence: Sentence) -> list[Candidate]:
    """A woman and her dog instead of a man and his, if nobody else is there."""
    tokens = sentence.tokens
    people = [p for p in sentence.phrases if _kind(p).startswith("person")]
    told = {t.word for t in tokens if t.word in PRONOUNS}
    if len(people) != 1 or not told or tokens[people[0].head].lemma not in OTHER_SEX:
        return []
    noun = tokens[people[0].head]
    if {SEXES[noun.lemma]} != {SEXES[w] for w in told}:
        return []
    edits: Candidate = ()
    for i, token in enumerate(tokens):
        new = OTHER_SEX.get(token.lemma if i == people[0].head else token.word)
        if token.word == "her" and (i + 1 == len(tokens) or tokens[i + 1].tag in ".PCDIGZBE"):
            new = "him"
        if new and (i == people[0].head or token.word in PRONOUNS):
            edits += _put(i, i, _plural(new) if token.tag == "S" else new)
    new = OTHER_SEX[noun.lemma]
    return [] if new in sentence.named or SETS[f"sex {SEXES[new]}"] & sentence.named else [edits]


def _kept(sentence: Sentence, phrase: Phrase, before: str) -> bool:
    """Whether the words around a noun need it: on her phone, a game of frisbee, and watches."""
    tokens, noun = sentence.tokens, sentence.tokens[phrase.head]
    kind = KINDS.get(noun.lemma, "")
    if before in SETS["before kept"] or "wii" in noun.lemma:
        return True  # to take home
    if noun.word == "glass" and phrase.first == phrase.head:
        return True  # behind glass
    if before == "off" and kind.startswith("place"):
        return True
    if kind == "place.water" and any(
        t.word in SETS["watery"] for t in tokens[phrase.first : phrase.head]
    ):
        return True
    if f"{before} {noun.lemma}" in SETS["set phrases"]:
        return True
    if before == "on" and kind == "device.hand":
        return True
    holder = tokens[phrase.first - 2].lemma if before == "of" else ""
    paired = holder == "pair" and noun.lemma in SETS["plural only"]
    sheet = holder in SETS["portions"] and kind == "home.read"
    if paired or sheet or holder in SETS["owners"]:
        return True
    penned = noun.lemma == "pen" and before in ("in", "inside", "inside of", "into")
    if penned or (noun.lemma == "mouse" and sentence.own & SETS["desks"]):
        return True
    if kind == "person.group" and any(t.word in SETS["possessive"] for t in tokens):
        return True
    return before == "and" and noun.lemma in ("watch", "fly", "ride", "look")


def _many(sentence: Sentence, phrase: Phrase) -> bool:
    """Whether a noun like sheep is a plural here."""
    noun = sentence.tokens[phrase.head]
    first = sentence.tokens[phrase.first]
    same = _plural(noun.lemma) == noun.lemma and KINDS.get(noun.lemma, "").startswith("animal")
    return same and not (first.tag == "D" and first.word not in ("some", "these", "the"))


def _things(sentence: Sentence, phrase: Phrase) -> list[str]:
    """Things that can stand in the place of the head of a phrase."""
    tokens, noun = sentence.tokens, sentence.tokens[phrase.head]
    first = tokens[phrase.first].word
    before = tokens[phrase.first - 1].word if phrase.first else ""
    if noun.lemma not in SENSES or _stays(sentence, phrase) or _kept(sentence, phrase, before):
        return []
    counted = noun.tag == "S" or first in ("a", "an", "one", "each", "every")
    sense = min(SENSES[noun.lemma], key=lambda sense: sense.mass == counted)
    if first in ("some", "any", "much") and noun.tag == "N" and not sense.mass:
        return []
    if sense.kind == "sport.game" and counted:
        return []  # a baseball is a ball
    clashing = _clashing(sentence, phrase)
    words = [w for w in _unnamed(sense, sentence) if w not in clashing]
    if sense.mass and not counted:
        words = [w for w in words if any(other.mass for other in SENSES.get(w, ()))]
    if _word(sentence, phrase.stop) == "of":
        words = [w for w in words if w in SETS["holding"]]
    if any(t.word in SETS["materials"] for t in tokens[phrase.first : phrase.head]):
        words = [w for w in words if KINDS.get(w) == sense.kind]  # a brick tree
    holder = tokens[phrase.first - 2].lemma if before == "of" else ""
    if holder in SETS["portions"]:
        words = [w for w in words if w not in SETS["loose"]]
    if holder == "flock":
        words = [w for w in words if KINDS[w] == "animal.bird" or w in ("sheep", "goat")]
    return [w for w in words if w not in PARTICULAR or _fits(sentence, phrase, w, before)]


def _clashing(sentence: Sentence, phrase: Phrase) -> set[str]:
    """Things that the captions of the image rule out in this place."""
    rows = CLASHING.get(KINDS.get(sentence.tokens[phrase.head].lemma, ""), ())
    return {thing for told, things in rows if sentence.named & told for thing in things}


def _stays(sentence: Sentence, phrase: Phrase) -> bool:
    """Whether the head of a phrase can be nothing else: a sheep with other sheep."""
    tokens, noun = sentence.tokens, sentence.tokens[phrase.head]
    first, inner = tokens[phrase.first], tokens[phrase.first : phrase.head]
    holds = KINDS.get(noun.lemma, "").startswith("container")
    if first.word in ("another", "other") or (_word(sentence, phrase.stop) == "of" and not holds):
        return True
    if SETS.get(f"parts of {noun.lemma}", frozenset()) & sentence.own:
        return True
    following = tokens[phrase.stop] if phrase.stop < len(tokens) else noun
    if following.word in ("that", "which") and _word(sentence, phrase.stop + 1) in ("has", "have"):
        return True  # a stove that has two ovens
    bare = phrase.first == phrase.head > 0 and noun.tag == "N"
    if following.word in ("boarding", "skiing"):
        return True
    looks = following.word == "looking" and phrase.stop + 1 in sentence.starts
    if looks or (bare and following.tag == "G" and tokens[phrase.first - 1].tag == "I"):
        return True  # pizza looking food, are snow skiing
    if [t.lemma for t in tokens].count(noun.lemma) > 1:
        return True  # a sheep with other sheep
    near = tokens[max(phrase.first - 2, 0) : phrase.first + 1]
    if SETS["denials"] & sentence.own and any(t.word in SETS["denials"] for t in near):
        return True  # not wearing a shirt
    return bool(inner) and _strange(inner, noun)


def _strange(inner: Sequence[Token], noun: Token) -> bool:
    """Whether the words before a noun in its phrase belong to it, or make it a verb."""
    if noun.word in VERB_FORMS and _matches(KINDS.get(inner[-1].lemma, ""), MOVERS[:2]):
        return True  # helps her child brush
    counted = any(t.tag == "M" or t.word in SETS["plurals"] for t in inner)
    if inner[0].word in ("a", "an") and noun.tag == "S" and not counted:
        return True  # wearing a helmet skateboards
    unknown = [k for k, t in enumerate(inner) if t.tag in "XU"]
    if not unknown:
        return False
    word, tag = inner[unknown[0]].word, inner[unknown[0]].tag
    if len(unknown) > 1 or tag == "U" or word.endswith(("s", "wn", "en")):
        return True  # file shelves
    if unknown[0] and inner[unknown[0] - 1].tag == "N":
        return True  # a leaf free tree
    return inner[0].tag not in "DMA" or noun.lemma == "player"  # a video player


def _fits(sentence: Sentence, phrase: Phrase, word: str, before: str) -> bool:
    """Whether a word with a quirk can be the head of a phrase, after the word before it."""
    tokens, noun = sentence.tokens, sentence.tokens[phrase.head]
    if word in NEVER.get(before, ()) or (noun.tag != "S" and word in SETS["plural only"]):
        return False
    if word in SETS["built in"]:
        return not any(_matches(KINDS.get(t.lemma, ""), HOUSES) for t in tokens)
    if word not in SEXES:
        return True
    sexes = {SEXES[t.word] for t in tokens if t.word in PRONOUNS}
    ages = {t.word for t in tokens[phrase.first : phrase.head]} & SETS["ages"]
    if sexes and sexes != {SEXES[word]}:
        return False
    if KINDS.get(noun.lemma) == "person.child":
        return not ages
    told = SETS[f"sex {SEXES[word]}"] & sentence.named
    return not told and (not ages or (word in CHILDREN) == (noun.lemma in CHILDREN))


def _action(sentence: Sentence, slots: Slots | None) -> list[Candidate]:
    """Let the subject do something else that takes the same complement."""
    found: list[Candidate] = []
    for i, verb in enumerate(sentence.tokens):
        if verb.tag in "EP" and verb.word in PARTICIPLE_ACTS:
            found += _paired(sentence, i) + _participles(sentence, i)
        elif verb.tag == "E":
            found += _paired(sentence, i)
        elif verb.word in ("on", "with"):
            found += [_put(i, i, act) for act in _implied(sentence, i)] + _begun(sentence, i)
        elif verb.tag == "P":
            found += _begun(sentence, i)
        elif verb.tag == "A" and verb.word in ACT_VALUES:
            found += [_put(i, i, new) for new in _values(sentence, i)]
        elif verb.tag in "GZB" and not _noun_like(sentence, i):
            found += _paired(sentence, i)
            last, acts = _acts(sentence, i)
            groups = PARTNERS.get(verb.lemma, set())
            found += [
                _put_act(i, last, _inflect(act, verb.tag))
                for act in dict.fromkeys(acts)
                if not _said(sentence, act) and not groups & PARTNERS.get(act, set())
            ]
    return found


def _participles(sentence: Sentence, i: int) -> list[Candidate]:
    """What else than parked, seated, stacked ... something can be there."""
    word, following = sentence.tokens[i].word, _word(sentence, i + 1)
    if i and sentence.tokens[i - 1].lemma in ("sit", "stand", "has", "have", "had"):
        return []  # sits parked
    if following in SETS["paths"] | {"at", "together"} or "dock" in sentence.own:
        return []
    if _kind(sentence.starts.get(i + 2)).startswith("vehicle") and following == "on":
        return []  # parked on a boat
    if word in ("stacked", "piled") and following == "on top of":
        return []
    if word in ("parked", "stopped") and SETS["wheeled"] & sentence.own:
        return []  # a bicycle does not drive
    flown = any(_kind(p) == "vehicle.air" for p in sentence.phrases)
    acts = [act for act in PARTICIPLE_ACTS[word] if not (flown and act == "driving")]
    return [_put(i, i, act) for act in acts if not _said(sentence, act)]


def _noun_like(sentence: Sentence, i: int) -> bool:
    """Whether verb i is rather a part of a noun: skate boarding, it's head."""
    before = sentence.tokens[i - 1].word if i else ""
    following = sentence.tokens[i + 1].tag if i + 1 < len(sentence.tokens) else ""
    if before in SETS["before no act"]:
        return True
    return following == "G" or (sentence.tokens[i].tag == "B" and before in ("it's", "that's"))


def _paired(sentence: Sentence, i: int) -> list[Candidate]:
    """Acts in the place of verb i and the relation after it: next to a horse, riding it."""
    verb, tokens, found = sentence.tokens[i], sentence.tokens, []
    if verb.tag == "E" and _word(sentence, i - 1) in ("has", "have", "had"):
        return []
    form = verb.tag if verb.tag in "GZB" else "G"
    posed = any(t.lemma in POSTURES for t in tokens[:i] + tokens[i + 1 :] if t.tag in "GZB")
    bent = i > 0 and tokens[i - 1].word == "to"  # getting ready to
    for last, relation in ((i, ""), (i + 1, _word(sentence, i + 1))):
        for who, kinds, acts in PAIRED_ACTS.get((verb.lemma, relation), ()):
            if _takes(sentence, last, kinds) and _does(sentence, i, who):
                found += [
                    _put_act(i, last, _inflect(act, form))
                    for act in acts
                    if not _said(sentence, act.partition(" ")[0])
                    and not (posed and act.split()[0] in LAID)
                    and not (bent and act in ("look at", "point at"))
                ]
    return found


def _takes(sentence: Sentence, last: int, kinds: Sequence[str]) -> bool:
    """Whether a thing of one of some kinds stands behind token ``last``, and no path goes on."""
    tokens, phrase = sentence.tokens, sentence.starts.get(last + 1)
    if kinds == ["."]:
        return phrase is None
    if phrase is None:
        return False
    first, noun, kind = tokens[phrase.first], tokens[phrase.head], _kind(phrase)
    counted = first.tag in "DM" or noun.tag == "S" or kind.startswith("food") or "hay" in kinds
    after = tokens[phrase.stop] if phrase.stop < len(tokens) else noun
    if not counted or after.word in SETS["goes on"] or after.tag in "BG":
        return False
    second = sentence.starts.get(phrase.stop + 1) if after.word == "and" else None
    mixed = second and tokens[last].tag in "GZB" and not _matches(_kind(second) or "?", kinds)
    if mixed or _held(sentence, phrase):
        return False  # a bike and a parking meter
    return noun.lemma in kinds or (noun.lemma != "curb" and _matches(kind or "?", kinds))


def _does(sentence: Sentence, i: int, who: Sequence[str]) -> bool:
    """Whether verb i is done by somebody or something of one of some kinds."""
    phrase = next((p for p in reversed(sentence.phrases) if p.stop <= i), None)
    between = sentence.tokens[phrase.stop : i] if phrase else []
    if any(t.tag not in "IQR" for t in between) or not _matches(_kind(phrase), {*who, *MOVERS}):
        phrase = _agent(sentence, i)  # a player at the plate swinging his bat
    if phrase is None or sentence.tokens[phrase.head].lemma in SETS["wheeled"]:
        return False  # a bicycle does not drive
    if _kind(phrase).startswith("vehicle") and sentence.own & SETS["haste"]:
        return False
    return _matches(_kind(phrase), who)


def _implied(sentence: Sentence, i: int) -> list[str]:
    """What somebody on or with a thing might do to it: a man on a horse, feeding a horse."""
    before = next((p for p in sentence.phrases if p.stop == i), None)
    after = sentence.starts.get(i + 1)
    if before is None or after is None or sentence.tokens[after.first].tag not in "DM":
        return []
    kind, acts = _kind(after), SETS[f"often {sentence.tokens[i].word}"]
    if kind.startswith("device") or any(t.tag in "IZB" for t in sentence.tokens[after.stop :]):
        return []  # on a phone; with a sandwich is drinking
    if sentence.own & SETS["airy"]:
        return []
    if not _kind(before).startswith("person") or kind.partition(".")[0] not in HANDLED:
        return []
    posed = any(t.lemma in POSTURES | MOVES and t.tag in "GZB" for t in sentence.tokens)
    done = () if posed or _held(sentence, after) else _done(sentence, i, after, kind)
    return [_inflect(act, "G") for act in done if act in acts and not _said(sentence, act)]


def _begun(sentence: Sentence, i: int) -> list[Candidate]:
    """An act where a caption has none: a zebra in a field, running in a field."""
    tokens, relation = sentence.tokens, sentence.tokens[i].word
    if ("none", relation) not in PAIRED_ACTS or not sentence.phrases:
        return []
    who = sentence.phrases[0]
    if _word(sentence, who.stop) == "of":
        who = sentence.starts.get(who.stop + 1, who)
    if who.stop > i or any(t.tag != "I" for t in tokens[who.stop : i]):
        return []
    kind, found = _kind(who), []
    acts = any(t.tag in "GZBEU" or t.word in PARTICIPLE_ACTS for t in tokens)
    for owners, kinds, news in PAIRED_ACTS.get(("none", relation), ()):
        busy = acts and _matches(kind, MOVERS)
        if _matches(kind, owners) and _takes(sentence, i, kinds) and not busy:
            new = [_inflect(act, "G") for act in news if not _said(sentence, act.partition(" ")[0])]
            found += [_put_act(i, i, act) for act in new]
    return found


def _held(sentence: Sentence, phrase: Phrase) -> bool:
    """Whether a part of a body follows: a ball in his hand."""
    after = sentence.tokens[phrase.stop : phrase.stop + 5]
    return any(
        KINDS.get(t.lemma) == "body" or t.lemma in ("glove", "mitt", "baseball glove")
        for t, owner in zip(after[1:], after, strict=False)
        if owner.word in SETS["owned"]
    )


def _said(sentence: Sentence, word: str) -> bool:
    """Whether a caption of the image has an act, or another word for it."""
    lemma = LEMMAS.get(word, word)
    if word.startswith("park") and sentence.named & {"parked", "stopped", "stop"}:
        return True
    implied = next((acts for acts in IMPLIED if lemma.partition(" ")[0] in acts), ())
    if any(act in sentence.named and act not in sentence.own for act in implied):
        return True  # another caption lets them run
    return bool(sentence.named & {word, lemma, *SAME_ACTS.get(lemma, ())})


def _acts(sentence: Sentence, i: int) -> tuple[int, Sequence[str]]:
    """Acts that fit in the place of verb i, and the last token that they replace."""
    verb, following = sentence.tokens[i], _word(sentence, i + 1)
    subject = _subject(sentence, i)
    alive = subject == "person" or (subject == "animal" and following != "at")
    if (verb.lemma, following) in PREPOSITIONAL_ACTS and alive:
        return i, PREPOSITIONAL_ACTS[verb.lemma, following]
    who = subject or "thing"
    free: Sequence[str] = FREE_ACTS.get((who, verb.lemma), ())
    agent = _agent(sentence, i)
    if _kind(agent) == "animal.bird" and verb.lemma in ("sit", "perch", "stand"):
        free = [act for act in free if act not in ("sit", "stand")]
    led = i + 2 in sentence.starts or following not in ("on", "in", "by")  # look on
    if not free and led and following in SETS["after acts"] and verb.lemma not in SETS["busy"]:
        free = ANY_ACT.get(subject, ())
    particle = following in SETS["particles"] and (i + 2 not in sentence.starts or not free)
    last = i + (particle and verb.lemma not in MOVES)  # sitting down, holding up a sign
    phrase = sentence.starts.get(last + 1)
    if phrase is None:
        return last, [] if following in ("to", "like") else _placed(sentence, i, last, free)
    kind = _kind(phrase)
    lifeless = subject not in ("person", "animal") and verb.lemma in SETS["states"]
    if kind == "body":
        return last, ()  # making faces
    if _held(sentence, phrase):
        return last, ()
    nameless = not kind and sentence.tokens[phrase.first].tag not in "DM" and subject != "person"
    if nameless or lifeless or verb.lemma in POSTURES or kind in ("idea", "part", "measure"):
        return last, ()
    if subject == "person":
        return last, _done(sentence, i, phrase, kind)
    if _word(sentence, phrase.stop) in SETS["paths"] | {"behind"}:
        return last, ()
    fits = (acts for who, kinds, acts in DONE_BY if who == subject and _matches(kind, kinds))
    return last, next(fits, ())


def _done(sentence: Sentence, i: int, phrase: Phrase, kind: str) -> Sequence[str]:
    """What people can do to a thing, there and in that form."""
    tokens, noun = sentence.tokens, sentence.tokens[phrase.head].lemma
    after = _word(sentence, phrase.stop)
    if _bound(sentence, i, phrase) or (not kind and noun not in SETS["weather"]):
        return ()
    acts = next(DONE[k] for k in (noun, kind, kind.split(".")[0], "any") if k in DONE)
    if kind == "feat":
        acts = ["watch", "film"] if tokens[i].lemma in SETS["done feats"] else []
    if noun in SETS["weather"]:
        acts = ["watch", "photograph"]
    counted = tokens[phrase.first].tag in "DM"
    if (kind == "sport.game" and counted) or noun in ("wii", "nintendo wii"):
        return ()  # practicing a baseball, watching the wii
    unfit = _unfit(sentence, i, kind, noun)
    acts = [act for act in acts if act not in unfit]
    if after == "and" and phrase.stop + 1 in sentence.starts:
        too = _kind(sentence.starts[phrase.stop + 1])  # a child and a phone
        both = next((DONE[k] for k in (too, too.split(".")[0], "any") if k in DONE), [])
        acts = [act for act in acts if act in both]
    led = after in SETS["paths"] or SETS["ways"] & {t.word for t in tokens[phrase.stop :][:8]}
    return [act for act in acts if act in SETS["along"]] if led else acts


def _unfit(sentence: Sentence, i: int, kind: str, noun: str) -> set[str]:
    """Acts that the rest of the caption keeps from a thing."""
    tokens, unfit = sentence.tokens, set()
    if KINDS.get(noun) in HOLDERS:
        unfit |= {"cook", "prepare", "make", "kiss", "lift"}  # a slice of the cake
    if sentence.own & SETS["aloft"]:
        unfit |= {"wash", "repair", "paint"}
    if kind in ("clothing.hand", "gear.glove") or "," in sentence.own:
        unfit |= {"hold", "carry"}  # while wearing it, or much else
    others = {t.lemma for t in tokens[:i] + tokens[i + 1 :] if t.tag in "GZB"}
    if tokens[i].lemma == "play" and (others or sentence.own & SETS["in play"]):
        unfit |= {"watch", "coach"}
    if noun == "video game":
        unfit |= {"coach", "practice"}
    if noun in ("meal", "dinner", "lunch", "breakfast") or "at" in sentence.own:
        unfit |= {"throw"}
    if tokens[i + 1].word in SETS["possessive"]:
        unfit |= {"buy"}
    if others & (POSTURES | MOVES):
        unfit |= {"ride"}  # standing on rocks
    if i and tokens[i - 1].word == "to":
        unfit |= {"watch", "film", "drop", "hold", "carry"}  # learning to watch
    return unfit


def _bound(sentence: Sentence, i: int, phrase: Phrase) -> bool:
    """Whether verb i and what follows its object belong together: hit a ball with a racket."""
    tokens, verb, noun = sentence.tokens, sentence.tokens[i], sentence.tokens[phrase.head]
    bare = tokens[phrase.first].tag not in "DM" and noun.tag != "S"
    if bare and not SENSES.get(noun.lemma, [NO_SENSE])[0].mass:
        return True
    if verb.lemma in SETS["needy"] or verb.word == "pressing":
        return True
    if _kind(phrase) == "feat" and (
        verb.lemma in SETS["geared"] or _word(sentence, phrase.stop) == "on"
    ):
        return True  # skateboarding tricks, a trick on a skateboard
    if noun.lemma == "kite" and sentence.own & SETS["airy"]:
        return True
    after = tokens[phrase.stop] if phrase.stop < len(tokens) else None
    if after is None:
        return False
    if after.tag in "DMBE" or after.word in ("to", "as", "off", "out of"):
        return True
    if _goes_along(sentence, phrase, after):
        return True
    rest = {t.word for t in tokens[phrase.stop :]}
    if rest & SETS["by themselves"] or (after.tag == "G" and after.lemma in SETS["done feats"]):
        return True
    if after.word == "for":
        return verb.lemma in SETS["made for"]
    tool = _kind(sentence.starts.get(phrase.stop + 1))
    return after.word == "with" and _matches(tool, ("gear", "tool", "body"))


def _goes_along(sentence: Sentence, phrase: Phrase, after: Token) -> bool:
    """Whether a second act goes with the first: holding pens and pointing, watching women play."""
    if after.word == "and" and phrase.stop + 1 < len(sentence.tokens):
        return sentence.tokens[phrase.stop + 1].tag in "GZB"
    return after.tag == "G" and phrase.kind.startswith("person")


def _placed(sentence: Sentence, i: int, last: int, acts: Sequence[str]) -> Sequence[str]:
    """Those of free acts that can be done where verb i is done."""
    verb, relation = sentence.tokens[i], _word(sentence, last + 1)
    if not acts or relation not in SETS["after free acts"]:
        return []  # up high, digging in to
    if verb.lemma in MOVES and _on(sentence, SETS["mounted"]):
        return []
    if sentence.own & SETS["held still"] or verb.lemma in (
        "ride",
        "drive",
        "go",
        "get",
    ):
        return []  # sleeping on a wave
    if SETS["ways"] & {t.word for t in sentence.tokens[last + 1 : i + 12]}:
        acts = [act for act in acts if act in MOVES]
    busy = {t.lemma for k, t in enumerate(sentence.tokens) if t.tag in "GZB" and k != i}
    if busy & {"hit", "play", "swing", "throw", "kick", "catch", "serve", "bat"}:
        acts = [act for act in acts if act != "sit"]
    if "wait" in busy:
        acts = [act for act in acts if act in POSTURES]
    if busy - POSTURES - {"hold", "wear", "have", "look", "watch"}:
        acts = [act for act in acts if act not in ("lie", "lay", "sleep", "crawl", "dance")]
    if SETS["seated"] & {t.word for t in sentence.tokens}:
        acts = [act for act in acts if act in POSTURES]  # a laptop on her lap
    if _on(sentence, ("gear.board", "gear.ski")):
        acts = [act for act in acts if act in ("sit", "stand", "kneel", "lie", "crouch", "jump")]
    return _on_ground(sentence, verb, last, acts)


def _on_ground(sentence: Sentence, verb: Token, last: int, acts: Sequence[str]) -> Sequence[str]:
    """Those of free acts that go with the relation and the place after them."""
    relation = _word(sentence, last + 1)
    ground = _kind(sentence.starts.get(last + 2))
    over = relation == "over" and not ground.startswith("place")
    mutual = relation in ("with", "on top of") and _word(sentence, last + 2) in PRONOUN_KINDS
    if relation in SETS["leading"] or over or mutual:
        return []  # posing for, walking over a laptop, talking with each other
    if relation in SETS["paths"]:
        led = last + 2 in sentence.starts  # down a street, not up and down
        return [act for act in acts if led and act in MOVES - {"fly", "slide", "jump", "leap"}]
    if relation == "with" or relation == "and":  # sits and reads, runs with a racket
        acts = [act for act in acts if act in POSTURES or (relation == "with" and act in MOVES)]
        return [act for act in acts if act not in ("sleep", "lie")]
    worked = ground.startswith("device") and verb.lemma not in POSTURES
    if worked or ground in ("body", "sky.any") or ground.startswith("sport"):
        return []  # on one leg, in the clouds, playing in a match
    if relation == "around" and ground:
        return [act for act in acts if act in MOVES and act != "crawl"]
    if relation == "at" and verb.lemma not in STILL:
        return []  # swinging at a ball
    if relation in ("on", "on top of") and ground == "place.water":
        return []
    if relation == "at":
        return [act for act in acts if act in ("sit", "stand", "sleep")]
    within = relation in ("on", "on top of", "in", "inside")
    if within and _matches(
        ground, ("furniture", "vehicle", "animal", "gear", "container", "fixture")
    ):
        return [act for act in acts if act in ("sit", "stand", "sleep", "lie", "kneel", "jump")]
    return acts


def _on(sentence: Sentence, things: Collection[str]) -> bool:
    """Whether somebody is on one of some things or kinds, such as a horse or skis."""
    tokens = sentence.tokens
    grounds = (
        phrase
        for first, phrase in sentence.starts.items()
        if first and tokens[first - 1].word in ("on", "on top of", "on the back of")
    )
    return any(tokens[p.head].lemma in things or _kind(p) in things for p in grounds)


def _subject(sentence: Sentence, i: int) -> str:
    """Who does verb i: person, animal, vehicle or thing, "" for unknown."""
    start = _clause(sentence, i)
    none = not any(p.stop <= i for p in sentence.phrases)
    if none or (start and sentence.tokens[start - 1].word in SETS["persons"]):
        return "person"
    agent = _agent(sentence, i)
    kind = _kind(agent).split(".")[0]
    if not kind:
        noun = sentence.tokens[agent.head].word if agent else ""
        return "person" if re.search("(ist|ian|wom[ae]n|m[ae]n|people|folk)s?$", noun) else ""
    return kind if kind in MOVERS else "thing"


def _clause(sentence: Sentence, i: int) -> int:
    """The first token of the clause that verb i stands in."""
    start = i
    while start and sentence.tokens[start - 1].tag not in "C.Q":
        start -= 1
    return start


def _agent(sentence: Sentence, i: int) -> Phrase | None:
    """The phrase that does verb i."""
    before = [p for p in sentence.phrases if p.stop <= i]
    start = _clause(sentence, i)
    inside = [p for p in before if p.first >= start]
    if inside and inside[-1].stop == i and not _matches(_kind(inside[0]), MOVERS[:2]):
        inside = inside[::-1]  # a kitchen with a man cooking
    idle = ("picture", "part", "body", "idea", "clothing", "measure")
    return next(
        (p for p in [*inside, *reversed(before)] if _kind(p).split(".")[0] not in idle),
        None,
    )


EDITORS = {"relation": _relation, "attribute": _attribute, "object": _object, "action": _action}


def _word(sentence: Sentence, i: int) -> str:
    return sentence.tokens[i].word if i < len(sentence.tokens) else "."


def _kind(phrase: Phrase | None) -> str:
    return phrase.kind if phrase else ""


def _matches(kind: str, wanted: Collection[str]) -> bool:
    """Whether a kind such as place.room is one of the wanted, which may be as wide as place."""
    return kind in wanted or kind.partition(".")[0] in wanted


def _unnamed(sense: Sense, sentence: Sentence) -> list[str]:
    """Choices that the captions of the image do not name, in these or other words."""
    barred = sentence.barred
    return [word for word, _ in sense.choices if word not in barred]


# Choosing a hard one

SLOT_WEIGHTS = (0.8, 0.8, 0.5, 0.5)  # of the four tables; their evidence overlaps
SMOOTH = 20.0  # captions' worth of belief that neighbours do not matter
RAREST = -log(2e5)  # log p of a word that the captions do not have
AIM, WIDTH = 3.0, 2.0  # log of how much likelier than the caption a negative should be, and spread
LEARNED = 200_000  # captions that the slots are learned from, the first of the source
BALANCED = 10_000  # of these, that the balance is found on
ROUNDS = 12
STRENGTH = (0.6, 0.3)  # of a step of the balance, for words and for pairs of words
LIMIT = 6.0  # of a balance, in nats
GRID = 2**13  # weights are rounded to 1 / GRID: another machine's last bit changes nothing
NO_NATS: dict[str, float] = {}


class Balance(NamedTuple):
    """What is put in too often is less welcome: weights in nats by word and by pair of words."""

    words: dict[str, float]
    left: dict[str, dict[str, float]]  # by the word before, then by the word
    right: dict[str, dict[str, float]]  # by the word after, then by the word


class Slots:
    """What stands where in a file's captions: counts of words by their neighbours.

    A word fits a slot as well as p(word) times what each neighbour says for or against it: the
    words next to it, and the nearest words of content on either side.
    """

    def __init__(self, refine: float = inf) -> None:
        """Start without a caption; more nats than ``refine`` lost to the balance, no negative."""
        self.refine = refine
        self.count: Counter[str] = Counter()
        self.tables: tuple[dict[str, dict[str, float]], ...] = ({}, {}, {}, {})
        self.inverse: dict[str, float] = {}
        self.prior: dict[str, float] = {}
        self.balance = {name: Balance({}, {}, {}) for name in NEGATIVE_TYPES}

    def learn(self, sentence: Sentence) -> None:
        """Count the words of one caption."""
        words = [t.word for t in sentence.tokens]
        self.count.update(words)
        for word, context in zip(words, sentence.contexts, strict=True):
            for table, key in zip(self.tables, context, strict=True):
                row = table.get(key)
                if row is None:
                    table[key] = {word: 1}
                else:
                    row[word] = row.get(word, 0) + 1

    def finish(self) -> None:
        """Turn the counts into what each neighbour says for a word, in nats."""
        total = sum(self.count.values()) / SMOOTH
        self.inverse = {word: total / count for word, count in self.count.items()}
        self.prior = {word: -log(rarity) for word, rarity in self.inverse.items()}
        for table, weight in zip(self.tables, SLOT_WEIGHTS, strict=True):
            for row in table.values():
                for word, count in row.items():
                    row[word] = weight * log(1 + count * self.inverse[word])

    def counted(self, table: int, key: str, word: str) -> int:
        """How often a word was learned beside this neighbour."""
        nats = self.tables[table].get(key, NO_NATS).get(word, 0.0)
        return round(expm1(nats / SLOT_WEIGHTS[table]) / self.inverse[word]) if nats else 0

    def fit(self, context: Context, words: tuple[str, str]) -> float:
        """Log of how well the words of a caption itself fit, but for its own count."""
        first, last = words
        total = self.prior.get(last, RAREST)
        for table, word in enumerate((first, last, last, last)):
            count = self.counted(table, context[table], word) - 1
            if count > 0:
                total += SLOT_WEIGHTS[table] * log(1 + count * self.inverse[word])
        return total


def learn_slots(
    sentences: Iterable[Sentence], types: Sequence[str] = NEGATIVE_TYPES, *, refine: float = inf
) -> Slots:
    """Learn from captions that have been read what stands where, and balance each type.

    The order of the captions does not matter.
    """
    slots, some, collects = Slots(refine), [], gc.isenabled()
    gc.disable()  # nothing here is ever garbage, and there is much of it
    try:
        for sentence in sentences:
            slots.learn(sentence)
            digest = zlib.crc32(sentence.caption.encode("utf-8", "surrogatepass"))
            some.append((digest, sentence.caption, sentence))
        slots.finish()
        some.sort(key=lambda item: item[:2])
        for name in _ordered(types):
            slots.balance[name] = _balanced([s for _, _, s in some[:BALANCED]], name, slots)
    finally:
        if collects:
            gc.enable()
    return slots


Row = Callable[[str, float], float]  # get() of a row of a table: nats of a word, 0 if unknown


class Site(NamedTuple):
    """A span that candidates replace: what its neighbours say, and how its own words fare."""

    before: Row
    after: Row
    ahead: Row
    behind: Row
    left: Row  # weights of the balance
    right: Row
    fit: float
    weight: float


def _weigh(
    sentence: Sentence,
    candidates: Sequence[Candidate],
    name: str,
    slots: Slots,
    gains: Sequence[float | None] | None = None,
) -> list[float]:
    """Log weights for the draw: as likely as the caption, and in balance over the corpus.

    ``gains``, how much likelier than the caption each one is, come from the slots if not given.
    """
    balance = slots.balance[name]
    words, prior = balance.words.get, slots.prior.get
    sites: dict[tuple[int, int, bool], Site] = {}
    span: tuple[int, int, bool] | None = None  # of the site at hand; most candidates share it
    weights = []
    for k, candidate in enumerate(candidates):
        if not candidate:
            weights.append(-slots.refine)
            continue
        gain = weight = 0.0
        for part in candidate:
            start, end, _, (first, last, head), moved = part
            if span != (start, end, moved):
                span = start, end, moved
                if span not in sites:
                    sites[span] = _site(sentence, part, balance, slots)
                before, after, ahead, behind, left, right, fit, own = sites[span]
            gain += before(first, 0.0) + after(last, 0.0) + ahead(head, 0.0) + behind(head, 0.0)
            gain += prior(head, RAREST) - fit
            weight += left(first, 0.0) + right(last, 0.0) - own
            if not moved:
                weight += words(first, 0.0)
                weight += words(last, 0.0) if last != first else 0.0
        if gains and (known := gains[k]) is not None:
            gain = known
        weights.append(round(GRID * (weight - abs(gain - AIM) / WIDTH)) / GRID)
    return weights


def _site(sentence: Sentence, part: Part, balance: Balance, slots: Slots) -> Site:
    i, j = part.first, part.last
    before, _, ahead, _ = sentence.contexts[i]
    _, after, _, behind = sentence.contexts[j]
    first, last = sentence.tokens[i].word, sentence.tokens[j].word
    left, right = balance.left.get(before, NO_NATS).get, balance.right.get(after, NO_NATS).get
    weight = left(first, 0.0) + right(last, 0.0)
    if not part.moved:
        for word in _words_out(sentence, part) if i != j else (first,):
            weight += balance.words.get(word, 0.0)
    t0, t1, t2, t3 = slots.tables
    return Site(
        t0.get(before, NO_NATS).get,
        t1.get(after, NO_NATS).get,
        t2.get(ahead, NO_NATS).get,
        t3.get(behind, NO_NATS).get,
        left,
        right,
        slots.fit((before, after, ahead, behind), (first, last)),
        weight,
    )


def _drawn(candidates: list[Candidate], logs: list[float], draw: int) -> Iterator[Candidate]:
    """Candidates in the order in which 64 random bits draw them, the likeliest most often."""
    top = max(logs, default=0.0)
    weights = [exp(w - top) for w in logs]
    while weights:
        sums = list(itertools.accumulate(weights))
        k = min(bisect.bisect_right(sums, draw / 2**64 * sums[-1]), len(sums) - 1)
        yield candidates[k]
        weights[k] = 0.0
        if not any(weights):
            return


def _balanced(sentences: Sequence[Sentence], name: str, slots: Slots) -> Balance:
    """Weights under which words and pairs come in about as often as they go out."""
    ids: dict[Any, int] = {}
    features: list[int] = []
    signs: list[int] = []
    rows: list[int] = []  # candidate of each feature
    owners: list[int] = []  # caption of each candidate
    logs: list[float] = []
    for owner, sentence in enumerate(sentences):
        candidates = EDITORS[name](sentence, slots)
        if slots.refine < inf and candidates:
            candidates.append(NONE)
        logs += _weigh(sentence, candidates, name, slots)
        for candidate in candidates:
            for feature, sign in _moves(sentence, candidate):
                features.append(ids.setdefault(feature, len(ids)))
                signs.append(sign)
                rows.append(len(owners))
            owners.append(owner)
    arrays = [np.array(column) for column in (features, signs, rows, owners, logs)]
    weights = _settle(arrays, [feature[0] for feature in ids])
    balance = Balance({}, {}, {})
    for (side, neighbour, word), weight in zip(ids, weights.tolist(), strict=True):
        if side == 0:
            balance.words[word] = weight
        elif weight:
            side_weights = balance.left if side == 1 else balance.right
            side_weights.setdefault(neighbour, {})[word] = weight
    return balance


def _moves(sentence: Sentence, candidate: Candidate) -> Iterator[tuple[tuple[int, str, str], int]]:
    """Words and pairs of words that come in (+1) and go out (-1) with a candidate."""
    tokens = sentence.tokens
    for part in candidate:
        before = tokens[part.first - 1].word if part.first else "^"
        after = tokens[part.last + 1].word if part.last + 1 < len(tokens) else "$"
        first, last = tokens[part.first].word, tokens[part.last].word
        one, two, _ = part.words
        if not part.moved:
            yield from (((0, "", word), 1) for word in dict.fromkeys((one, two)))
            yield from (((0, "", word), -1) for word in _words_out(sentence, part))
        yield (1, before, one), 1
        yield (1, before, first), -1
        yield (2, after, two), 1
        yield (2, after, last), -1


def _words_out(sentence: Sentence, part: Part) -> list[str]:
    """The words that go out, each once, in their order: sums must not hang on that of a set."""
    return list(dict.fromkeys(t.word for t in sentence.tokens[part.first : part.last + 1]))


def _settle(arrays: Sequence[np.ndarray], sides: Sequence[int]) -> np.ndarray:
    """Weight of each feature, found by evening out how often it is expected to come and go.

    Args:
        arrays: feature, sign and candidate of each move; caption and log weight of each candidate.
        sides: 0 for features that are words, 1 or 2 for pairs.
    """
    features, signs, rows, owners, logs = arrays
    weights = np.zeros(len(sides))
    if not len(owners):
        return weights
    step = np.where(np.array(sides) == 0, *STRENGTH)
    begins = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    sizes = np.diff(np.r_[begins, len(owners)])
    for _ in range(ROUNDS):
        total = logs + np.bincount(rows, weights[features] * signs, len(owners))
        total = np.exp(total - np.repeat(np.maximum.reduceat(total, begins), sizes))
        share = total / np.repeat(np.add.reduceat(total, begins), sizes)
        come = np.bincount(features, share[rows] * (signs > 0), len(sides))
        go = np.bincount(features, share[rows] * (signs < 0), len(sides))
        # rounded, so that another machine's last bit changes nothing
        weights = np.round(weights + step * np.log((go + 1) / (come + 1)), 3)
        weights = weights.clip(-LIMIT, LIMIT)
    return weights


# Writing an edit


def _written(sentence: Sentence, candidate: Candidate) -> list[Edit]:
    """The edits of a candidate as offsets and text; an article before them is mended."""
    caption, tokens, edits = sentence.caption, sentence.tokens, []
    edited, loud = {part.last for part in candidate}, caption.isupper()
    for part in candidate:
        start, end = tokens[part.first].start, tokens[part.last].end
        new = part.new if part.moved else _cased(part.new, caption[start:end], loud)
        if part.first == 0 and not part.moved and caption[start].isupper():
            new = new[0].upper() + new[1:]  # TV on a stand
        before = tokens[part.first - 1] if part.first else None
        fixed = part.moved or part.first - 1 in edited
        if before and before.word in ("a", "an") and not fixed:
            old, article = caption[before.start : before.end], _article(new)
            if article != before.word:
                new = _cased(article, old, loud) + caption[before.end : start] + new
                start = before.start
        edits.append((start, end, new))
    return edits


def _cased(new: str, old: str, loud: bool) -> str:
    """Capitals of the old text on the new; those of a word like TV, if all others are ``loud``."""
    if loud or (len(old) > 1 and old.isupper() and old.lower() not in SETS["letters"]):
        return new.upper()
    raised = old[0].isupper() and (len(old) == 1 or not old.isupper())
    return new[0].upper() + new[1:] if raised else new


def _apply(caption: str, edits: Iterable[Edit]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        caption = caption[:start] + new + caption[end:]
    return caption


# Adapter to the old engine: goes away with it

Learned = Slots


class Options(NamedTuple):
    """What a rewriting depends on, but for the captions."""

    types: tuple[str, ...] = NEGATIVE_TYPES
    seed: int = 0
    exchange: float = 0.5
    plausible: float = 0.0
    refine: float = inf
    tag: Callable[[str], Any] | None = None


def _known(caption: str, options: Options) -> tuple[Sentence | None, frozenset[str]]:
    """A caption as the engine reads it, and the facts that it states."""
    sentence = _read_spacy(options.tag(caption)) if options.tag else _read(caption)
    return sentence, frozenset(_facts(sentence) if sentence else ())


def learn(captions: Sequence[str], images: Sequence[str], options: Options) -> Learned:
    """Count what fits where."""
    read = (_known(caption, options)[0] for caption in captions)
    return learn_slots((s for s in read if s), options.types, refine=options.refine)


def rewrite(
    captions: Sequence[str],
    others: Sequence[tuple[str, ...]],
    keys: Sequence[str],
    learned: Learned | None,
    options: Options,
) -> list[dict[str, Negative]]:
    """Negatives of a block of captions."""
    found = []
    for caption, rest, key in zip(captions, others, keys, strict=True):
        sentence = _known(caption, options)[0]
        facts = frozenset().union(*(_known(other, options)[1] for other in rest))
        sentence = _forbid(sentence, facts) if sentence and facts else sentence
        made = edit_sentence(
            sentence, seed=options.seed, key=key, types=options.types, slots=learned
        )
        rule = "no word that can be replaced" if sentence else "not English"
        found.append({n: made[n] or Negative(None, (), rule) for n in options.types})
    return found


def contradicted(caption: str, negative: str, others: Sequence[str]) -> str:
    """Why the negative may be true of the image; "" if it is false.  STUB until the new core."""
    return ""


def _read_spacy(doc: Any) -> Sentence | None:
    """A caption with spaCy's parts of speech and noun phrases."""
    tokens: list[Token] = []
    for word, start, end in _split(doc.text):
        span = doc.char_span(start, end, alignment_mode="expand")
        tag = _tag_of(span[-1])
        if word in FUNCTION and (" " in word or tag in "IR"):
            tag = FUNCTION[word]
        lemma = LEMMAS.get(word, span[-1].lemma_.lower() if " " not in word else word)
        lemma = NOUN_FORMS[word][0] if tag in "NS" and word in NOUN_FORMS else lemma
        lemma = VERB_FORMS[word][0] if tag in "GZB" and word in VERB_FORMS else lemma
        tokens.append(Token(word, start, end, tag, word if tag in "DMAIPCQR." else lemma))
    phrases = _chunk(tokens)
    if doc.has_annotation("DEP"):
        at = {t.start: i for i, t in enumerate(tokens)}
        chunks = [(at.get(c.start_char), c.end_char) for c in doc.noun_chunks]
        stops = {t.end: i + 1 for i, t in enumerate(tokens)}
        found = [(i, stops.get(end, 0)) for i, end in chunks if i is not None]
        phrases = [Phrase(i, j, j - 1) for i, j in found if i < j and tokens[j - 1].tag in "NSX"]
    return _sentence(doc.text, tokens, phrases, frozenset())


def _tag_of(token: Any) -> str:
    """Our tag of a spaCy token."""
    fine = {"VBG": "G", "VBZ": "Z", "VB": "B", "VBP": "B", "VBN": "E", "VBD": "E", "PRP$": "D"}
    fine |= {"NN": "N", "NNP": "N", "NNS": "S", "NNPS": "S", "TO": "P", "WDT": "Q"}
    coarse = {"AUX": "I", "DET": "D", "NUM": "M", "ADJ": "A", "ADP": "P", "CCONJ": "C", "PRON": "Q"}
    coarse |= {"SCONJ": "C", "ADV": "R", "PUNCT": ".", "SYM": ".", "PART": "R"}
    if token.pos_ in ("AUX", "ADP"):
        return coarse[token.pos_]
    return fine.get(token.tag_) or coarse.get(token.pos_, "X")


# Captions on disk
#
# All of the kit reads and writes captions here: manifests, tables, json, the samples of shards.


class DataError(ValueError):
    """A mistake in a user's file or option; the message names the place and how to mend it."""


def run_script(
    main: Callable[[], int | None], name: str, *, quiet: Callable[[], bool] = lambda: False
) -> int:
    """Run the main function of a script and return the exit code.

    A mistake of the user is one sentence on stderr and code 2, Ctrl-C is code 130, and a reader
    who has seen enough of the output (``| head``) is no error.  ``quiet`` tells whether another
    rank says the sentence.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks letters shows "?"
            sys.stdout.reconfigure(errors="replace")
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DataError, OSError) as error:
        if not quiet():
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


class Launch(NamedTuple):
    """This process among all of a run, as its launcher numbered them."""

    rank: int
    world: int
    local: int  # among those of this machine


LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


def launcher() -> Launch:
    """Read who this process is from torchrun's variables, else from SLURM's, else it is alone.

    Under srun it also sets MASTER_ADDR, to the first node of the job, and MASTER_PORT, to one made
    from the number of the job, unless they are set.

    Raises:
        DataError: some of a launcher's variables are missing, or they are no numbers that fit.
    """
    env = os.environ
    # A script of sbatch has no SLURM_NTASKS unless it asks for it; a shell of salloc has no other.
    one = {("SLURM_PROCID", "SLURM_LOCALID"): "0", ("SLURM_NTASKS",): "1"}
    for names in LAUNCHERS:
        there = tuple(name for name in names if name in env)
        if not there or env[there[0]] == one.get(there):
            continue
        if there != names:
            missing = next(name for name in names if name not in env)
            raise DataError(
                f"{there[0]} is {env[there[0]]} but {missing} is not set: start all processes with "
                f"torchrun or srun, or unset {there[0]} to run one"
            )
        try:
            found = Launch(*(int(env[name]) for name in names))
        except ValueError:
            found = Launch(0, 0, 0)
        if not (0 <= found.rank < found.world and found.local >= 0):
            raise DataError(
                f"{', '.join(f'{name}={env[name]}' for name in names)}: must be numbers from 0, "
                f"{names[0]} less than {names[1]}; start with torchrun or srun, or unset them"
            )
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if names[0] == "SLURM_PROCID" and nodes:
            first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu[07-09,12] is gpu07
            env.setdefault("MASTER_ADDR", first)
            job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or "0"
            env.setdefault("MASTER_PORT", str(20_000 + int(job) % 20_000))
        return found
    return Launch(0, 1, 0)


def why(error: Exception) -> str:
    """What the system says; torch hides it behind an error of its own."""
    told = error if isinstance(error, OSError) else error.__context__
    if isinstance(told, OSError):
        full = told.errno in (errno.ENOSPC, errno.EDQUOT)
        return "disk full" if full else str(told.strerror or told)
    return str(error).splitlines()[0][:160]


def lock(out: Path) -> Any:
    """Keep other runs out of the directory until this process ends, or the file is closed."""
    try:
        file = (out / "run.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({why(error)}); check it") from None
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held by workers
    except OSError as error:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise DataError(
                f"--out {out}: {holder} trains into it; wait for its end, or choose another --out"
            ) from None
        print(f"--out {out}: its disk has no locks; start no second run there", file=sys.stderr)
        return file
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        file.flush()
    return file


@contextlib.contextmanager
def writing(
    path: Path, overwrite: bool = False, *, partial: Path | None = None
) -> Iterator[BinaryIO]:
    """Open NAME.partial, and rename it to NAME when the block ends; after an error it goes.

    Files are never replaced without ``overwrite``; that, or a full disk, is a DataError.
    """
    if path.is_dir() or not path.name:
        raise DataError(f"{path}: is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists; pass --overwrite or choose another name")
    partial = partial or path.with_name(path.name + ".partial")
    try:
        with partial.open("wb" if overwrite else "xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise DataError(
            f"{partial}: left by a run that was cut off, or of one that is at work; "
            "remove it, or pass --overwrite"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({why(error)}); check folder and disk"
        ) from None


def write_lines(path: Path, rows: Iterable[dict[str, Any]], overwrite: bool = False) -> int:
    """Write JSON lines, whole or not at all, and count them."""
    count = 0
    with writing(path, overwrite) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007 - the count is returned
            file.write(json_line(row))
    return count


def json_line(row: dict[str, Any]) -> bytes:
    """A row as a line of UTF-8."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a character, which only an escape can say
        return (json.dumps(row) + "\n").encode()


CHUNK = 256  # captions handed to a worker at once
Wording = str | list[str] | None  # a negative; of several, training draws one an epoch


class Record(NamedTuple):
    """A caption of a manifest, and its negatives by type."""

    image: str | None
    image_id: int | str | None
    caption: str
    negatives: dict[str, Wording]


def split_types(text: str) -> tuple[str, ...]:
    """The types of ``--types relation,counting``."""
    try:
        return _checked_types(text.split(","), "--types")
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _checked_types(names: Any, place: str) -> tuple[str, ...]:
    """Names of types: letters, digits, "-" and "_"."""
    good = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not good or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise DataError(f"{place}: types must be names of letters, digits, - and _, not {names!r}")
    if len(set(names)) < len(names):
        raise DataError(f"{place}: a type is named twice in {', '.join(names)}")
    return tuple(names)


def header_types(row: dict[str, Any], place: str) -> tuple[str, ...]:
    """The types that a header, or the .json of a sample, names; () if it names none."""
    return _checked_types(row["types"], f'{place}: "types"') if "types" in row else ()


def parse_record(
    line: bytes | dict[str, Any],
    place: str,
    types: Sequence[str] = NEGATIVE_TYPES,
    *,
    some: bool = False,
    need_image: bool = False,
) -> Record:
    """Read one record of a manifest, from its line or the JSON object of it.

    The negatives of the record have the keys ``types``, null where one is missing; ``some`` leaves
    out those of other types, which are else a DataError, as is all that is no record: it names
    the place.
    """
    row = line if isinstance(line, dict) else _parse_row(line, place)
    image, caption, given = row.get("image"), row.get("caption"), row.get("negatives")
    if image is None and not need_image:
        pass
    elif not isinstance(image, str) or not image:
        raise DataError(f'{place}: "image" must be a file name, not {image!r}')
    elif image.startswith("/") or "\\" in image or (".." in image and ".." in image.split("/")):
        raise DataError(
            f'{place}: "image" {image!r} leaves the folder of --images; name it from there'
        )
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{place}: the caption must be a sentence, not {str(caption)[:40]!r}")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise DataError(f'{place}: "negatives" must be an object with a key for each type')
    unknown = next((key for key in given if key not in types), None)
    if unknown is not None and not some:
        raise DataError(
            f'{place}: "negatives" has the key {unknown!r}, and the types are {", ".join(types)}; '
            'name them in the header, {"manifest": 1, "types": [...]}, or with --types'
        )
    negatives = {name: _wording(given.get(name), place, name) for name in types}
    return Record(image, row.get("image_id"), caption, negatives)


def _wording(given: Any, place: str, name: str) -> Wording:
    """A negative as it was given; an empty list is null."""
    if given is None or given == []:
        return None
    for text in given if isinstance(given, list) else [given]:
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{place}: the {name} negative must be a sentence, a list of sentences or null, "
                f"not {str(text)[:40]!r}"
            )
    return given


def _parse_json(text: bytes | str, place: str, kind: str) -> Any:
    """JSON; ``kind`` says in messages what was wanted."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError:
        raise DataError(f"{place}: is not UTF-8 text; {kind}") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        where = f" of line {line}" if line > 1 else ""
        column = getattr(error, "colno", 0)
        raise DataError(f"{place}: is not JSON at column {column}{where}; {kind}") from None


def _parse_row(line: bytes, place: str) -> dict[str, Any]:
    row = _parse_json(line, place, "a manifest has one JSON object a line")
    if not isinstance(row, dict):
        raise DataError(f'{place}: is not a record {{"image": ..., "caption": ...}}')
    return row


def read_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Read a manifest: where each line begins, its name in messages, and its JSON object.

    A header, a row with the key ``manifest``, may stand anywhere: ``cat`` joins manifests.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(b"\xef\xbb\xbf\r\n\t "):
                    place = f"{path}:{number}"
                    yield offset, place, _parse_row(line, place)
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_records(
    path: Path, types: Sequence[str] = (), *, need_image: bool = False
) -> Iterator[tuple[int, Record]]:
    """Read the records of a manifest, and where their lines begin.

    Their negatives have the keys ``types``; without, those that headers named so far, else
    NEGATIVE_TYPES: the last record has all types of the file.
    """
    named = tuple(types)
    for offset, place, row in read_rows(path):
        if "manifest" in row:
            more = () if types else header_types(row, place)
            named = tuple(dict.fromkeys((*named, *more)))
        else:
            named = named or NEGATIVE_TYPES
            yield offset, parse_record(row, place, named, some=bool(types), need_image=need_image)


def read_captions(
    path: Path | str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    negatives: Sequence[str] = (),
) -> Iterator[Record]:
    """Read captions from any of the formats of the module's docstring, "-" for stdin.

    Columns of a table, if not given: ``filepath`` or ``image``, ``title`` or ``caption``, and
    ``neg_caption``.  Columns of negatives are named COLUMN or COLUMN:TYPE, and a cell of one holds
    a sentence, or several as a Python list.  A DataError names what is not as it should be.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if (image_column or caption_column or negatives) and suffix not in (".csv", ".tsv"):
        raise DataError(f"{path}: only a .csv or .tsv has columns to name")
    try:
        if str(path) == "-":
            lines = io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", newline="\n")
            for number, line in enumerate(lines, 1):
                yield parse_record({"caption": line.rstrip("\r\n")}, f"-:{number}")
        elif suffix == ".jsonl":
            yield from (record for _, record in read_records(path))
        elif suffix == ".json":
            yield from _read_json(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_table(path, image_column, caption_column, negatives)
        else:
            raise DataError(f"{path}: unknown kind of file; want .jsonl, .json, .csv, .tsv or -")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _read_json(path: Path) -> Iterator[Record]:
    """A COCO captions file, or either layout of the Karpathy splits."""
    data = _parse_json(path.read_bytes(), str(path), "JSON lines are named .jsonl")
    place = str(path)
    try:
        files = {}
        if isinstance(data, dict) and "annotations" in data:
            files = {image["id"]: image["file_name"] for image in data.get("images", ())}
        rows = data if isinstance(data, list) else data.get("annotations", data.get("images"))
        for i, row in enumerate(rows):
            place = f"{path}: record {i}"
            image_id = row.get("image_id", row.get("cocoid", row.get("imgid")))
            if "sentences" in row:
                image = "/".join(filter(None, (row.get("filepath"), row["filename"])))
                captions = [sentence["raw"] for sentence in row["sentences"]]
            else:
                image = row.get("image", files.get(image_id))
                captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
            for caption in captions:
                found = {"image": image, "image_id": image_id, "caption": caption}
                yield parse_record(found, place, ())
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: neither COCO nor Karpathy form ({error!r})") from None


def _read_table(
    path: Path, image: str | None, caption: str | None, negatives: Sequence[str]
) -> Iterator[Record]:
    """A table; as in a .csv, a cell of a .tsv that begins with a quote ends with one."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        delimiter = "\t" if "\t" in lines.readline() else ","
        lines.seek(0)
        table = csv.reader(lines, delimiter=delimiter, strict=True)
        place, columns = f"{path}:1", []
        try:
            columns = next(table, [])
            pick = _columns(path, columns, image, caption, negatives) if columns else {}
            while True:
                start = table.line_num + 1
                place = f"{path}:{start}"
                row = next(table, None)
                if row is None:
                    return
                if row:
                    yield _table_record(row, pick, len(columns), place)
        except csv.Error as error:
            raise DataError(
                f"{place}: a cell that begins here is not well quoted ({error}); a cell that "
                "begins with a quote ends with one, and quotes inside it are doubled"
            ) from None


def _columns(
    path: Path,
    columns: list[str],
    image: str | None,
    caption: str | None,
    negatives: Sequence[str],
) -> dict[str, int]:
    """Number of the column of the image, the caption and, with ":" before it, of each type."""
    wanted = {
        "image": [image] if image else ["filepath", "image"],
        "caption": [caption] if caption else ["title", "caption"],
    }
    found = {key: [c for c in names if c in columns] for key, names in wanted.items()}
    for text in negatives or [c for c in ("neg_caption",) if c in columns]:
        column, _, name = (text, "", text) if text in columns else text.rpartition(":")
        (kind,) = _checked_types([name], f"--negative {text}")
        if f":{kind}" in found:
            raise DataError(f"--negative {text}: two columns are of the type {kind}")
        found[f":{kind}"] = [c for c in (column or name,) if c in columns]
    lacks = [key for key, names in found.items() if not names and (key != "image" or image)]
    if lacks:
        raise DataError(
            f"{path}:1: columns are {', '.join(columns)}; "
            "name yours with --image-column, --caption-column and --negative"
        )
    return {key: columns.index(names[0]) for key, names in found.items() if names}


def _table_record(row: list[str], pick: dict[str, int], columns: int, place: str) -> Record:
    if len(row) != columns:
        raise DataError(
            f"{place}: {len(row)} cells for {columns} columns; quote texts that hold the delimiter"
        )
    for text in row:
        if "\n" in text.strip():
            raise DataError(
                f"{place}: a quote that opens here closes lines later, and took in "
                f"{text.strip().splitlines()[1][:40]!r}; close it, or write the text on one line"
            )
    negatives: dict[str, Any] = {}
    for key, column in pick.items():
        if key.startswith(":"):
            text = row[column].strip()
            negatives[key[1:]] = text or None
            if text.startswith("["):
                try:
                    negatives[key[1:]] = ast.literal_eval(text)
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    raise DataError(f"{place}: {text[:40]!r} is no Python list of texts") from None
    found = {key: row[column] for key, column in pick.items() if not key.startswith(":")}
    return parse_record({**found, "negatives": negatives}, place, tuple(negatives))


def read_samples(
    path: str | Path, file: BinaryIO | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read the samples of a webdataset shard: members whose names agree up to the first dot.

    Yields that name, with its folder, and the contents by what follows the dot, in lower case.
    ``file`` is a stream to read instead of the path.  A shard that was cut off is a DataError.
    """
    try:
        with tarfile.open(
            None if file else path, "r|" if file else "r:", fileobj=file, tarinfo=_Header
        ) as tar:
            files = (member for member in tar if not member.isdir())
            for stem, members in itertools.groupby(files, key=lambda m: _split_name(m.name)[0]):
                parts: dict[str, bytes] = {}
                for member in members:
                    suffix = _split_name(member.name)[1]
                    content = tar.extractfile(member)
                    if content is None:
                        raise DataError(f"{path}: {member.name} is neither file nor link")
                    if suffix in parts:
                        raise DataError(f"{path}: {member.name} is in it twice")
                    parts[suffix] = content.read()
                yield stem, parts
    except KeyError as error:
        raise DataError(f"{path}: a link to what is not in it ({error})") from None
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is it a whole .tar shard?") from None


class _Header(tarfile.TarInfo):
    """A member's header; unlike tarfile, it knows the end of a shard from a cut."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        """Read the next one."""
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the two empty blocks at the end
                raise
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}") from None


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def sample_row(stem: str, parts: dict[str, bytes], place: str) -> dict[str, Any]:
    """The row of a manifest that a sample holds: its .json, whose caption may stand in a .txt."""
    row = _parse_row(parts["json"], place) if "json" in parts else {}
    if row.get("caption") is None and "txt" in parts:
        try:
            row["caption"] = parts["txt"].decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{place}: its .txt is not UTF-8") from None
    return row


def add_sample(tar: tarfile.TarFile, stem: str, parts: dict[str, bytes]) -> None:
    """Append a sample to a shard that is being written."""
    for suffix, content in parts.items():
        info = tarfile.TarInfo(f"{stem}.{suffix}" if suffix else stem)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


# Engines


Job = tuple[dict[str, Any], tuple[str, ...]]  # a row, and the other captions of its image
Made = dict[str, Negative]
Counts = Counter[tuple[str, str]]  # of type and "exchange", "replace" or the rule of a null
Line = tuple[int, list[str], bytes]  # number of the job, how each type was made, and its line
Chat = Callable[[list[dict[str, str]], threading.Event], str]  # messages to an answer


class Engine(NamedTuple):
    """Who rewrites captions; the same in every process."""

    name: str
    options: Options
    learned: Learned | None = None
    explain: bool = False
    parse: Callable[[str], Any] | None = None  # spaCy's pipeline, of the released recipe
    masked: MaskedModel | None = None
    chat: Chat | None = None
    requests: int = 1  # to the language model at once
    fallback: str = "lexicon"


def _engine(args: argparse.Namespace) -> Engine:
    """Load the models that the engine needs."""
    parse = masked = chat = None
    if args.engine in ("spacy", "released"):
        parse = load_spacy(args.spacy_model, tags_only=args.engine == "released")
    if args.engine == "released":
        masked = MaskedModel(args.mlm, args.device)
    if args.engine == "llm":
        chat = _server_chat(args)
    tag = parse if args.engine == "spacy" else None
    options = Options(args.types, args.seed, args.exchange, args.plausible, args.refine, tag)
    more = (parse, masked, chat, args.llm_requests, args.fallback)
    return Engine(args.engine, options, None, args.explain, *more)


def _taught(engine: Engine, rows: Iterable[dict[str, Any]]) -> Engine:
    """The engine with what it learns from the captions, if it does."""
    if engine.name == "released" or (engine.chat and engine.fallback == "null"):
        return engine
    some = list(itertools.islice(rows, LEARNED))
    images = [_image_of(row) for row in some]
    return engine._replace(learned=learn([row["caption"] for row in some], images, engine.options))


def load_spacy(name: str, *, tags_only: bool) -> Callable[[str], Any]:
    """An English pipeline of spaCy."""
    try:
        import spacy
    except ImportError:
        raise DataError("--engine: spaCy is missing; pip install spacy") from None
    try:
        return spacy.load(name, exclude=["ner", "parser"] if tags_only else ["ner"])
    except OSError:
        raise DataError(
            f"--spacy-model {name}: not installed; python -m spacy download {name}"
        ) from None


class MaskedModel:
    """A masked language model that says what may stand in the place of a mask."""

    def __init__(self, name: str, device: str) -> None:
        """Load a model with its head, from a folder or by name."""
        try:
            import torch
            from transformers import AutoModelForMaskedLM, AutoTokenizer
        except ImportError:
            raise DataError("--mlm: transformers is missing; pip install transformers") from None
        if device == "cuda" and not torch.cuda.is_available():
            raise DataError("--device cuda: this machine has no CUDA device; use cpu or auto")
        cuda = device != "cpu" and torch.cuda.is_available()
        self.torch, self.device = torch, "cuda" if cuda else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, report = AutoModelForMaskedLM.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # each of its readers has errors of its own
            reason = str(error).splitlines()[0]
            raise DataError(f"--mlm {name}: cannot be loaded ({reason})") from None
        missing = sorted(report["missing_keys"])
        if missing or self.tokenizer.mask_token is None:
            raise DataError(f"--mlm {name}: has no masked-language-model head, lacks {missing[:2]}")
        self.model = model.to(self.device).eval()

    def fill(self, texts: Iterable[str], rank: int = 3, batch: int = 256) -> dict[str, str]:
        """Texts with their first mask filled by the guess of this rank, 0 for the likeliest.

        The whole sequence is decoded, as transformers' fill-mask pipeline does, so that word
        pieces join ("a wig" and "##gling" are "a wiggling").  A text whose mask was cut off is
        left out.
        """
        torch, mask = self.torch, self.tokenizer.mask_token_id
        found: dict[str, str] = {}
        texts = sorted(set(texts), key=lambda text: (len(text), text))
        for at in range(0, len(texts), batch):
            part = texts[at : at + batch]
            rows = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                logits = self.model(**rows.to(self.device)).logits.float().cpu()
            for text, ids, scores in zip(part, rows["input_ids"].cpu(), logits, strict=True):
                places = (ids == mask).nonzero().flatten()
                if len(places):
                    filled = ids.clone()
                    filled[places[0]] = scores[places[0]].topk(rank + 1).indices[rank]
                    filled = filled[filled != self.tokenizer.pad_token_id]
                    found[text] = str(self.tokenizer.decode(filled, skip_special_tokens=True))
        return found


def _released(captions: Sequence[str], keys: Sequence[str], engine: Engine) -> list[Made]:
    """Negatives as the published code makes them, faults included; only the draws are seeded.

    spaCy's NOUN, ADJ and VERB words; of three nouns and more the first two change places by
    ``str.replace``; one word of each class, drawn at random, is masked where it first appears
    (even inside another word) and filled with the 4th guess of the masked model; nothing is
    checked.  A class without a word is null here; there it is what the model makes of a bare mask,
    which distilroberta-base makes "###", the text of a missing negative.  train.py --recipe
    released encodes "###" for null.
    """
    assert engine.parse is not None
    assert engine.masked is not None
    mask = engine.masked.tokenizer.mask_token
    classes = {"ADJ": "attribute", "NOUN": "object", "VERB": "action"}
    drawn: list[dict[str, str]] = []
    for doc, key in zip(map(engine.parse, captions), keys, strict=True):
        caption, texts = str(doc.text), dict[str, str]()
        words = {p: [t.text for t in doc if t.pos_ == p] for p in classes}
        nouns = words["NOUN"]
        if len(nouns) > 2:
            swapped = caption.replace(nouns[0], "temp1").replace(nouns[1], nouns[0])
            texts["relation"] = swapped.replace("temp1", nouns[1])
        start = f"{engine.options.seed}:{key}:{caption}".encode("utf-8", "surrogatepass")
        rng = random.Random(start)
        for pos, name in classes.items():
            if words[pos]:
                texts[name] = caption.replace(rng.choice(words[pos]), mask, 1)
        drawn.append(texts)
    filled = engine.masked.fill(t for texts in drawn for n, t in texts.items() if n != "relation")
    none = Negative(None, (), "no word of its class")
    made = []
    for texts in drawn:
        found = {
            name: Negative(filled[t], (), "replace") for name, t in texts.items() if t in filled
        }
        if "relation" in texts:
            found["relation"] = Negative(texts["relation"], (), "exchange")
        made.append({name: found.get(name, none) for name in engine.options.types})
    return made


# A language model as an engine
#
# It answers for all types of a caption at once.  What it says is measured by the same musts as the
# lexicon's negatives: one changed span or an exchange, not true by another caption, not equal.

TASK = """\
You write hard negatives: sentences that differ from the caption of an image at one place and are \
false of the image. Change as little as possible and keep every other word as it is. Each sentence \
must be grammatical English and clearly false, going by all captions of the image. Do not use \
"no", "not" or "without".
relation: exchange two noun phrases ("a man riding a horse": "a horse riding a man"); only where \
that cannot be, replace one preposition or linking verb by one that contradicts it.
attribute: exchange the attributes of two nouns ("a red bus and a blue car": "a blue bus and a red \
car"); only where that cannot be, replace one colour, size, age, material or number.
object: replace one noun by another of its kind.
action: replace one verb by another that cannot go on at the same time, in the same form.
Answer with one JSON object and nothing else. Its keys are {types}; each value is the sentence, or \
null where none can be made.

Caption: {caption}
Other captions of the image: {others}"""
AGAIN = "Not accepted: {reasons}. Answer again, with one JSON object that has the keys {types}."
NONE_GIVEN = "the model gave none"
ANSWER_WORD = re.compile("[^\\W_]+(?:['\u2019-][^\\W_]+)*|[^\\w\\s]|_")
TRIES = 6  # of a request
PAUSE = 0.5  # seconds after the first try; doubled after each one
LONGEST_PAUSE = 60.0
ANSWER_TOKENS = 1024


def _server_of(args: argparse.Namespace) -> tuple[urllib.parse.SplitResult, str]:
    """The address of --llm, and the key, which no message shows."""
    try:
        parts = urllib.parse.urlsplit(args.llm)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.username:
        raise DataError(f"--llm {args.llm}: want a URL like http://localhost:8000/v1")
    key = os.environ.get(args.llm_key_env, "").strip() if args.llm_key_env else ""
    if args.llm_key_env and not re.fullmatch("[!-~]+", key):
        raise DataError(
            f"--llm-key-env {args.llm_key_env}: the environment has no such key, or one with "
            "spaces or other letters than ASCII; export it first"
        )
    return parts, key


def _server_chat(args: argparse.Namespace) -> Chat:
    """What asks the server of --llm, in the OpenAI-compatible chat protocol."""
    parts, key = _server_of(args)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    path = parts.path.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    shape = {"model": args.llm_model, "temperature": 0, "seed": args.seed}
    shape["max_tokens"] = ANSWER_TOKENS

    def send(body: bytes) -> tuple[int, bytes, float]:
        """Status, content, and seconds that the server wants us to wait."""
        connection = kind(parts.netloc, timeout=args.llm_timeout)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            wait = response.headers.get("Retry-After", "")
            content = response.read()
            return response.status, content, float(wait) if wait.isdecimal() else 0.0
        except (OSError, http.client.HTTPException) as error:
            return 0, (str(error) or type(error).__name__).encode(), 0.0
        finally:
            connection.close()

    def ask(messages: list[dict[str, str]], stop: threading.Event) -> str:
        """The text of one answer; who is busy or breaks off is asked again, ever later."""
        body = json.dumps({**shape, "messages": messages}).encode()
        for attempt in range(TRIES):
            status, content, wait = send(body)
            if status == 200:
                try:
                    return str(json.loads(content)["choices"][0]["message"]["content"])
                except (ValueError, LookupError, TypeError, RecursionError):
                    content = b"that is not of the chat protocol: " + content
            said = " ".join(content.decode("utf-8", "replace").split())[:200]
            said = f"{status or ''} {said}".replace(key or "\0", "***").strip()
            if status not in (0, 200, 408, 425, 429) and status < 500:
                raise DataError(
                    f"--llm {args.llm}: refuses a request ({said}); "
                    "check the address, --llm-model and --llm-key-env"
                )
            pause = min(max(wait, PAUSE * 2**attempt), LONGEST_PAUSE)
            if attempt == TRIES - 1 or stop.wait(pause):
                break
        raise DataError(
            f"--llm {args.llm}: gave no answer ({said}); the same command goes on where it was"
        )

    return ask


def _asked(engine: Engine, job: Job, stop: threading.Event) -> Made:
    """The negatives of one caption: asked for, what is not accepted once again, then --fallback."""
    assert engine.chat is not None
    row, others = job
    caption, types = row["caption"], engine.options.types
    task = TASK.format(types=", ".join(types), caption=caption, others=" | ".join(others) or "none")
    messages = [{"role": "user", "content": task}]
    made: Made = {}
    asked = list(types)
    for _ in range(2):
        answer = engine.chat(messages, stop)
        given = _parse_answer(answer, types)
        for name in asked:
            taken = [n.text for n in made.values() if n.text]
            made[name] = _accepted(name, caption, given, others, taken)
        asked = [n for n in asked if made[n].text is None and made[n].how != NONE_GIVEN]
        if not asked:
            break
        reasons = "; ".join(f"{name}: {made[name].how}" for name in asked)
        again = AGAIN.format(reasons=reasons, types=", ".join(asked))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
    if engine.fallback == "lexicon" and any(n.text is None for n in made.values()):
        own = rewrite([caption], [others], [_image_of(row)], engine.learned, engine.options)[0]
        for name in types:
            same = [_plain_words(n.text) for n in made.values() if n.text]
            text = own[name].text
            if made[name].text is None and text and _plain_words(text) not in same:
                made[name] = own[name]
    return {name: made[name] for name in types}


def _parse_answer(answer: str, types: Sequence[str]) -> dict[str, Any] | str:
    """The JSON object of an answer, which may stand in a ```json fence, or what is wrong."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", answer, re.DOTALL)
    try:
        given = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return "the answer is not JSON"
    if not isinstance(given, dict) or not given.keys() <= set(types):
        return "the answer is not an object with these keys"
    return given


def _accepted(
    name: str,
    caption: str,
    given: dict[str, Any] | str,
    others: Sequence[str],
    taken: Sequence[str],
) -> Negative:
    """The caption with the edits of an answer, or none, and why."""
    if isinstance(given, str):
        return Negative(None, (), given)
    if (text := given.get(name, "")) is None:
        return Negative(None, (), NONE_GIVEN)
    if not isinstance(text, str) or not text.strip() or "\n" in text.strip():
        return Negative(None, (), "no sentence was given")
    if any(_plain_words(text) == _plain_words(other) for other in (caption, *others, *taken)):
        return Negative(None, (), "it is a caption of the image, or another negative")
    edits, how = edits_between(caption, text)
    if not edits:
        return Negative(None, (), "it changes more than one place, or only adds or drops words")
    if how == "exchange" and name not in ("relation", "attribute"):
        return Negative(None, (), f"an exchange is no {name} negative")
    new = caption
    for start, end, words in sorted(edits, reverse=True):
        new = new[:start] + words + new[end:]
    why = contradicted(caption, new, others)
    return Negative(None, (), why) if why else Negative(new, edits, how)


def _answer_words(text: str) -> list[re.Match[str]]:
    """Words and marks, without the marks at the end."""
    found = list(ANSWER_WORD.finditer(text))
    while found and not found[-1][0][0].isalnum():
        found.pop()
    return found


def _plain_words(text: str) -> list[str]:
    """Equal for sentences that differ in capitals, spaces, marks at the end, or "a" and "an"."""
    words = [match[0].casefold() for match in _answer_words(text)]
    return ["a" if word == "an" else word for word in words]


def edits_between(caption: str, text: str) -> tuple[tuple[Edit, ...], str]:
    """The edits that make a sentence of a caption, if it is one replaced span or an exchange.

    Returns:
        edits and "exchange" or "replace"; no edits if it is neither.
    """
    spans = _changed_spans(_plain_words(caption), _plain_words(text))
    old, new = _answer_words(caption), _answer_words(text)
    edits: list[Edit] = []
    at = to = 0
    for a, b, c, d in [*spans, (len(old), len(old), len(new), len(new))] if spans else []:
        for one, two in zip(old[at:a], new[to:c], strict=True):
            if one[0].casefold() != two[0].casefold():  # a or an
                edits.append((one.start(), one.end(), two[0]))
        if b > a:
            edits.append(
                (old[a].start(), old[b - 1].end(), text[new[c].start() : new[d - 1].end()])
            )
        at, to = b, d
    return tuple(edits), "exchange" if len(spans) == 2 else "replace"


def _changed_spans(old: list[str], new: list[str]) -> list[tuple[int, int, int, int]]:
    """Where words went out and came in: two spans that changed places, one span, or nothing."""
    moves = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changes = [move for move in moves if move[0] != "equal"]
    if len(old) == len(new) and changes:
        same = [a == b for a, b in zip(old, new, strict=True)]
        i, n = same.index(False), len(same) - same[::-1].index(False)
        for x, y in itertools.product(range(1, n - i), repeat=2):
            swapped = old[n - y : n] + old[i + x : n - y] + old[i : i + x]
            if x + y <= n - i and swapped == new[i:n]:
                return [(i, i + x, i, i + y), (n - y, n, n - x, n)]
    if len(changes) != 1 or changes[0][0] != "replace":
        return []
    _, a, b, c, d = changes[0]
    short = b - a <= max(1, len(old) // 2) and d - c <= b - a + 2
    return [(a, b, c, d)] if short else []


def _ask_all(jobs: Iterable[tuple[int, Job]], engine: Engine) -> Iterator[Line]:
    """Lines in the order in which the answers come.

    After Ctrl-C or a fault nothing new is asked, and the answers that are under way are kept.
    """
    tasks: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Line | BaseException] = queue.SimpleQueue()
    stop, todo, waiting = threading.Event(), iter(jobs), 0

    for task in itertools.islice(todo, engine.requests):
        own = (engine, tasks, answers, stop)
        threading.Thread(target=_answer, args=own, daemon=True).start()
        tasks.put(task)
        waiting += 1
    fault: BaseException | None = None
    while waiting:
        try:
            found: Line | BaseException = answers.get()
            waiting -= 1
        except KeyboardInterrupt as error:
            if stop.is_set():
                raise
            print(f"waiting for {waiting} answers; Ctrl-C again to lose them", file=sys.stderr)
            found = error
        if isinstance(found, BaseException):
            fault = fault or found
            stop.set()
        else:
            yield found
        for task in () if stop.is_set() else itertools.islice(todo, 1):
            tasks.put(task)
            waiting += 1
    if fault:
        raise fault


def _answer(engine: Engine, tasks: Any, answers: Any, stop: threading.Event) -> None:
    """A thread that asks for one caption after the other."""
    while True:
        number, job = tasks.get()
        try:
            answers.put(_line(engine, number, job, _asked(engine, job, stop)))
        except Exception as error:  # raised again where the answers are read
            answers.put(error)


# The command

UNSHAPING = {"captions", "out", "overwrite", "workers", "stats", "device"}  # do not shape the lines
UNSHAPING |= {"llm", "llm_key_env", "llm_requests", "llm_timeout"}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the layout of __doc__ and print every default."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare every option."""
    parser = argparse.ArgumentParser(
        prog="negatives.py", description=__doc__, formatter_class=_Help
    )
    add = parser.add_argument
    add("captions", nargs="*", metavar="CAPTIONS", help='a file, "-" for stdin, or .tar shards')
    add("--text", metavar="CAPTION", help="print the negatives of one caption")
    add("--out", type=Path, metavar="FILE.jsonl", help="the manifest, or the folder of shards")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    engines = ["lexicon", "spacy", "released", "llm"]
    add("--engine", choices=engines, default="lexicon", help="who rewrites")
    add("--types", type=split_types, default=NEGATIVE_TYPES, metavar="A,B", help="to make")
    add("--exchange", type=float, default=0.5, metavar="SHARE", help="of relations and attributes "
        "that could be exchanged or replaced, this share is exchanged, 0 to 1")  # fmt: skip
    add("--plausible", type=float, default=0.0, metavar="F", help="more is more plausible, fewer")
    add("--refine", type=float, default=inf, metavar="F", help="less hides better, and makes fewer")
    add("--seed", type=int, default=0, metavar="N", help="another seed, other choices")
    add("--workers", type=int, default=1, metavar="N", help="processes of lexicon and spacy")
    add("--limit", type=int, metavar="N", help="read the first N captions only")
    add("--stats", action="store_true", help="print coverage, exchanges and the rule of each null")
    add("--explain", action="store_true", help="say what was edited: under edits in the manifest")
    table = parser.add_argument_group("tables").add_argument
    table("--image-column", metavar="NAME", help="of a .csv or .tsv")
    table("--caption-column", metavar="NAME", help="of a .csv or .tsv")
    table("--negative", nargs="+", default=(), metavar="COLUMN[:TYPE]", help="negatives to keep")
    model = parser.add_argument_group("models").add_argument
    model("--spacy-model", metavar="NAME", default="en_core_web_sm", help="of spacy and released")
    model("--mlm", metavar="DIR_OR_NAME", default="distilroberta-base", help="of released")
    model("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of models in here")
    text = "server of the OpenAI-compatible chat protocol, as http://localhost:8000/v1"
    model("--llm", metavar="URL", help=text)
    model("--llm-model", metavar="NAME", help="the server's name of the model")
    model("--llm-key-env", metavar="NAME", help="environment variable that holds the key")
    model("--llm-requests", type=int, default=16, metavar="N", help="at once")
    model("--llm-timeout", type=float, default=120.0, metavar="S", help="seconds for an answer")
    model("--fallback", choices=["lexicon", "null"], default="lexicon",
          help="where the language model's answers are not accepted")  # fmt: skip
    args = parser.parse_args(argv)
    for fault in _faults(args):
        parser.error(fault)
    return args


def _faults(args: argparse.Namespace) -> Iterator[str]:
    """What cannot be meant."""
    shards = [name.endswith(".tar") for name in args.captions]
    unknown = [name for name in args.types if name not in NEGATIVE_TYPES]
    counts = (args.workers, args.llm_requests, 1 if args.limit is None else args.limit)
    rules = {
        "want either CAPTIONS or --text": bool(args.captions) == (args.text is not None),
        "--out goes with CAPTIONS; --text prints": args.text is not None and args.out,
        "--out is missing: name the .jsonl file to write, or the folder of the shards": (
            args.captions and args.out is None
        ),
        "--workers, --limit and --llm-requests must be at least 1": min(counts) < 1,
        "several CAPTIONS must all be .tar shards": len(args.captions) > 1 and not all(shards),
        "--limit does not go with shards": any(shards) and args.limit,
        "--exchange must be from 0 to 1": not 0 <= args.exchange <= 1,
        "--refine and --llm-timeout must be above 0": min(args.refine, args.llm_timeout) <= 0,
        "--refine and --plausible must be numbers": args.refine != args.refine
        or args.plausible != args.plausible,
        f"--types {','.join(unknown)}: want some of {','.join(NEGATIVE_TYPES)}": unknown,
        "--engine llm and --llm URL go together": (args.engine == "llm") != bool(args.llm),
        "--llm-model is missing, the server's name of the model": args.llm and not args.llm_model,
    }
    return (rule for rule, broken in rules.items() if broken)


def main(argv: list[str] | None = None) -> None:
    """Write the negatives of a file, or print those of one caption."""
    args = parse_args(argv)
    if args.text is not None:
        _print_text(args)
    elif args.captions[0].endswith(".tar"):
        _rewrite_shards(args)
    else:
        _rewrite_file(args)


def _print_text(args: argparse.Namespace) -> None:
    job: Job = ({"image": None, "image_id": None, "caption": args.text}, ())
    engine = _engine(args)
    made = _asked(engine, job, threading.Event()) if engine.chat else _made(engine, [job])[0]
    for name, negative in made.items():
        print(f"{name:<10}{negative.text or f'- ({negative.how})'}")
        for edit in _edits(args.text, negative) if args.explain else ():
            print(f"{'':<10}  {edit['start']}-{edit['end']}: {edit['old']!r} -> {edit['new']!r}")


def _edits(caption: str, negative: Negative) -> list[dict[str, Any]]:
    return [
        {"start": start, "end": end, "old": caption[start:end], "new": new}
        for start, end, new in sorted(negative.edits)
    ]


def _rewrite_file(args: argparse.Namespace) -> None:
    out, source = args.out, args.captions[0]
    if out.is_dir() or not out.name:
        raise DataError(f"--out {out} is a folder; name a file in it")
    if launcher()[1] > 1:
        raise DataError(f"{source}: ranks share .tar shards; run one process with --workers")
    if out.exists() and not args.overwrite:
        raise DataError(f"--out {out} exists; name another file or add --overwrite")
    if out.exists() and source != "-" and out.samefile(source):
        raise DataError(f"--out {out} is the source itself; name another file")
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    found = read_captions(source, **columns, negatives=args.negative)
    rows = [record._asdict() for record in itertools.islice(found, args.limit)]
    if not rows:
        raise DataError(f"{source}: no captions in it; is it the right file?")
    types = _settle_types(rows, args.types)
    jobs = _jobs(rows)
    engine = _engine(args)
    with Journal(args, out, jobs, source) as journal:
        if -1 in journal.at:
            journal.fill(_taught(engine, rows))
        header = _header(args, journal, types, Path(source).name)
        with writing(out, True, partial=out.with_name(out.name + ".partial.new")) as file:
            file.write(json_line(header))
            file.writelines(map(journal.line, range(len(jobs))))
    _report(args, journal.counts)


def _settle_types(rows: list[dict[str, Any]], made: Sequence[str]) -> tuple[str, ...]:
    """All types of the output: those that are made, and others that the source has already."""
    own = dict.fromkeys(n for row in rows for n, given in row["negatives"].items() if given)
    types = tuple(dict.fromkeys((*made, *own)))
    for row in rows:
        row["negatives"] = {name: row["negatives"].get(name) for name in types}
    return types


def _image_of(row: dict[str, Any]) -> str:
    image = row.get("image_id") if row.get("image_id") is not None else row.get("image")
    return "" if image is None else str(image)


def _jobs(rows: list[dict[str, Any]]) -> list[Job]:
    """Each row with the other captions of its image, which are true of it as well."""
    captions: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if _image_of(row):
            captions[_image_of(row)].append(row["caption"])
    return [
        (row, tuple(c for c in captions.get(_image_of(row), ()) if c != row["caption"]))
        for row in rows
    ]


def _made(engine: Engine, jobs: Sequence[Job]) -> list[Made]:
    captions, keys = [row["caption"] for row, _ in jobs], [_image_of(row) for row, _ in jobs]
    if engine.name == "released":
        return _released(captions, keys, engine)
    return rewrite(captions, [others for _, others in jobs], keys, engine.learned, engine.options)


def _line(engine: Engine, number: int, job: Job, made: Made) -> Line:
    row = {**job[0], "negatives": {**job[0]["negatives"], **{n: x.text for n, x in made.items()}}}
    if engine.explain:
        row["edits"] = {n: _edits(row["caption"], x) if x.text else None for n, x in made.items()}
    return number, [made[name].how for name in engine.options.types], json_line(row)


def _work(engine: Engine, block: Sequence[tuple[int, Job]]) -> list[Line]:
    made = _made(engine, [job for _, job in block])
    return [_line(engine, n, job, found) for (n, job), found in zip(block, made, strict=True)]


def _results(jobs: list[tuple[int, Job]], engine: Engine, workers: int) -> Iterator[Line]:
    """The line of each job, from this process, from several, or from a language model."""
    if engine.chat:
        yield from _ask_all(jobs, engine)
        return
    blocks = [jobs[at : at + CHUNK] for at in range(0, len(jobs), CHUNK)]
    workers = 1 if engine.masked else min(workers, len(blocks))
    if workers < 2:
        for block in blocks:
            yield from _work(engine, block)
        return
    served: list[tuple[Process, Connection]] = []
    try:
        for k in range(workers):
            here, there = Pipe(duplex=False)
            args = (engine, blocks[k::workers], there)
            served.append((Process(target=_serve, args=args, daemon=True), here))
            served[-1][0].start()
            there.close()
        for k in range(len(blocks)):
            try:
                found = served[k % workers][1].recv()
            except EOFError:
                raise DataError(
                    "--workers: one was killed, perhaps for memory; the same command goes on"
                ) from None
            if isinstance(found, Exception):
                raise found
            yield from found
    finally:
        for process, _ in served:
            process.terminate()


def _serve(engine: Engine, blocks: Sequence[list[tuple[int, Job]]], pipe: Connection) -> None:
    """Work on blocks in another process."""
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            for block in blocks:
                pipe.send(_work(engine, block))
        except Exception as error:  # raised again where the results are read
            pipe.send(error)


def _header(
    args: argparse.Namespace, journal: Journal, types: Sequence[str], source: str
) -> dict[str, Any]:
    header = {"manifest": 1, "engine": args.engine, "seed": args.seed}
    if args.engine in ("spacy", "released"):
        header["spacy"] = args.spacy_model
    if args.engine == "released":
        header["mlm"] = Path(args.mlm).name
    else:
        header |= {"exchange": args.exchange, "plausible": args.plausible}
        header |= {"refine": args.refine} if args.refine < inf else {}
    if args.engine == "llm":
        header |= {"llm": args.llm_model, "fallback": args.fallback}
    checksum = hashlib.sha256()
    for number in range(len(journal.at)):
        checksum.update(journal.line(number))
    tallies = {name: _tally(journal.counts, name) for name in args.types}
    return {
        **header,
        "types": types,
        "source": source,
        "captions": len(journal.at),
        "negatives": {name: made for name, (made, _, _) in tallies.items()},
        "exchanges": {name: exchanged for name, (_, exchanged, _) in tallies.items()},
        "nulls": {name: nulls for name, (_, _, nulls) in tallies.items()},
        "sha256": checksum.hexdigest(),
    }


def _tally(counts: Counts, name: str) -> tuple[int, int, dict[str, int]]:
    """Negatives of a type, how many of them are exchanges, and nulls by the rule that left none."""
    found = {how: n for (of, how), n in sorted(counts.items()) if of == name}
    exchanged, replaced = found.pop("exchange", 0), found.pop("replace", 0)
    return exchanged + replaced, exchanged, found


def _report(args: argparse.Namespace, counts: Counts) -> None:
    """Coverage, share of exchanges, and the rules of the nulls."""
    for name in args.types if args.stats else ():
        made, exchanged, nulls = _tally(counts, name)
        total = max(1, made + sum(nulls.values()))
        share = exchanged / max(made, 1)
        print(f"{name:<10}{made:>8} of {total} ({made / total:.1%}), {share:.1%} by exchange")
        for rule, count in sorted(nulls.items(), key=lambda item: -item[1]):
            print(f"{'':<10}{count:>8} null: {rule}")


# Runs that are stopped


class Journal:
    """What is finished of an output, in NAME.partial: the same command goes on from there.

    Each line has the number of a caption, how its types were made, and its line of the output, in
    any order.  The file is locked while a run writes it, and removed when the output is there.
    """

    def __init__(self, args: argparse.Namespace, out: Path, jobs: list[Job], source: str) -> None:
        """Open the journal of ``out``, and read what a run that was stopped has left."""
        self.path, self.args, self.jobs = out.with_name(out.name + ".partial"), args, jobs
        self.counts: Counts = Counter()
        self.at = array("q", [-1]) * len(jobs)  # where the line of each job begins
        mark = json_line({"manifest": 1, "unfinished": _fingerprint(args, jobs, source)})
        with self._writable():
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self.file = os.fdopen(file, "r+b")
            try:
                self._claim()
                self._read(mark)
            except BaseException:
                self.file.close()
                raise

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"--out {self.path}: cannot be written ({error.strerror or error}); "
                "check folder and disk, and start again"
            ) from None

    def _claim(self) -> None:
        """Lock the file for this process, not for its workers, where the system can."""
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
            except (BlockingIOError, PermissionError, FileNotFoundError):
                free = False
            if not free:
                raise DataError(
                    f"{self.path}: another run is writing it; wait, or name another --out"
                )

    def _read(self, mark: bytes) -> None:
        head, end = self.file.readline(), len(mark)
        if head and not head.startswith(b'{"manifest": 1, "unfinished"'):
            raise DataError(f"{self.path}: not of a run of this script; move it away")
        if head not in (b"", mark) and not self.args.overwrite:
            raise DataError(
                f"{self.path}: left by a run with other options, captions or another version "
                "of this script; go on with those, move it away or add --overwrite"
            )
        for number, line in enumerate(self.file if head == mark else (), 2):
            if not line.endswith(b"\n"):
                break  # torn
            try:
                index, hows, row = line.split(b"\t", 2)
                place, made = int(index), json.loads(hows)
                if self.at[place] >= 0 or len(made) != len(self.args.types) or row[:1] != b"{":
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                raise DataError(
                    f"{self.path}: line {number} is damaged; move the file away"
                ) from None
            self.at[place] = end
            self.counts.update(zip(self.args.types, made, strict=True))
            end += len(line)
        self.file.seek(0)
        self.file.write(mark)
        self.file.seek(end)
        self.file.truncate()

    def fill(self, engine: Engine) -> None:
        """Make the lines that are missing."""
        left = [(n, job) for n, job in enumerate(self.jobs) if self.at[n] < 0]
        with self._writable():
            for number, hows, line in _results(left, engine, self.args.workers):
                self.at[number] = self.file.tell()
                self.file.write(b"%d\t%s\t%s" % (number, json.dumps(hows).encode(), line))
                self.counts.update(zip(self.args.types, hows, strict=True))
                if engine.chat:  # an answer costs more than a write
                    self.file.flush()

    def line(self, number: int) -> bytes:
        """The line of a caption."""
        self.file.seek(self.at[number])
        return self.file.readline().split(b"\t", 2)[2]

    def __enter__(self) -> Journal:
        """Nothing to do."""
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Keep the file if something went wrong."""
        with self._writable() if error is None else contextlib.suppress(OSError):
            if error is None:
                self.path.unlink()
            self.file.close()


def _fingerprint(args: argparse.Namespace, jobs: list[Job], source: str) -> str:
    """Of all that shapes the lines: the options, the captions, and this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    options = {k: v for k, v in vars(args).items() if k not in UNSHAPING}
    digest.update(json.dumps([options, source], default=str).encode())
    for row, others in jobs:
        digest.update(json.dumps([row, others]).encode())
    return digest.hexdigest()


# Shards


def _rewrite_shards(args: argparse.Namespace) -> None:
    """Copy webdataset shards into a folder, with negatives in the .json of each sample.

    Every rank takes each WORLD_SIZE-th shard.  A shard that is there already is not made again.
    """
    paths = sorted(map(Path, args.captions))
    double = next((n for n, count in Counter(path.name for path in paths).items() if count > 1), "")
    if double:
        raise DataError(f"{double}: two shards have this name and would be written to one file")
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"--out {args.out} is a file; shards need a folder")
    for path in paths:
        if (args.out / path.name).exists() and path.samefile(args.out / path.name):
            raise DataError(f"--out {args.out} has the source {path} itself; name another folder")
    rank, world, _ = launcher()
    mine = [p for p in paths[rank::world] if args.overwrite or not (args.out / p.name).exists()]
    total: Counts = Counter()
    if mine:
        rows = (row for path in paths for _, _, row in _samples(path))
        engine = _taught(_engine(args), rows)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--out {args.out}: cannot be made ({error.strerror})") from None
        for path in mine:
            total.update(_rewrite_shard(path, args, engine))
    there = len(paths[rank::world]) - len(mine)
    left = f", {there} were there already (--overwrite makes them again)" if there else ""
    print(f"rank {rank} of {world}: {len(mine)} shards written{left}", file=sys.stderr)
    _report(args, total)


def _rewrite_shard(path: Path, args: argparse.Namespace, engine: Engine) -> Counts:
    samples = list(_samples(path))
    rows = [row for _, _, row in samples]
    types = _settle_types(rows, args.types)
    for row in rows if types != NEGATIVE_TYPES else ():
        row["types"] = types
    jobs, out = _jobs(rows), args.out / path.name
    with Journal(args, out, jobs, path.name) as journal:
        journal.fill(engine)
        with (
            writing(out, True, partial=out.with_name(out.name + ".partial.new")) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for number, (stem, parts, _) in enumerate(samples):
                add_sample(tar, stem, {**parts, "json": journal.line(number)})
    return journal.counts


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """Name, members and row of every sample of a shard."""
    for stem, parts in read_samples(path):
        place = f"{path}: sample {stem}"
        row = sample_row(stem, parts, place)
        types = header_types(row, place) or NEGATIVE_TYPES
        yield stem, parts, {**row, **parse_record(row, place, types)._asdict()}


if __name__ == "__main__":
    sys.exit(run_script(main, "negatives.py"))
