"Captioned pictures: subject x style x background, composed from an atlas of emoji"
import hashlib, html, json, re
from functools import lru_cache
from pathlib import Path
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

folder = Path(__file__).parent/'atlas'
cell = 96            # side of one subject in the atlas, in pixels

styles = {           # style -> the words for it; {s} is the subject with its article
    'plain': ('a picture of {s}', 'a photo of {s}', 'an image of {s}', '{s}', 'a photograph of {s}'),
    'watercolor': ('a watercolor painting of {s}', 'a watercolor of {s}', '{s}, watercolor', '{s} (watercolor)'),
    'oil painting': ('an oil painting of {s}', '{s} (oil on canvas)', '{s}, oil painting', 'an oil on canvas of {s}'),
    'pencil sketch': ('a pencil sketch of {s}', 'a pencil drawing of {s}', '{s}, pencil sketch', 'a sketch of {s}'),
    'pixel art': ('pixel art of {s}', 'a pixel art picture of {s}', '{s}, pixel art', '{s} in pixel art style'),
}
backgrounds = {      # background -> its words, appended to the subject
    'white': ('', ' on a white background'),
    'beach': (' on a beach', ' on the beach'),
    'snow': (' in the snow', ' in snow'),
    'forest': (' in a forest', ' in the forest'),
    'night': (' at night', ' under the night sky'),
    'meadow': (' in a meadow', ' on the grass'),
    'desert': (' in the desert', ' in a desert'),
    'sunset': (' at sunset', ' in front of a sunset'),
    'ocean': (' in the ocean', ' under water'),
    'red': (' on a red background',), 'blue': (' on a blue background',),
    'green': (' on a green background',), 'yellow': (' on a yellow background',),
    'purple': (' on a purple background',),
}

# --- the atlas -----------------------------------------------------------------------------------------------------
@lru_cache
def _entries(): return json.loads((folder/'subjects.json').read_text())

@lru_cache
def _sheet(): return Image.open(folder/'atlas.webp').convert('RGBA')

def subjects(
    n:int=None,  # Only the first `n`: the list begins with the ones trained longest (all if None)
)->list:         # Names, one per subject; any of its other names works in `render` too
    "The subjects in the atlas, by their first name"
    return [e['names'][0] for e in _entries()[:n]]

@lru_cache
def _index(): return {name: i for i, e in reversed(list(enumerate(_entries()))) for name in e['names']}

def find(
    subject:str,  # A subject's name or one of its keywords, e.g. "puppy" or "dog"
)->dict:          # `names`, `char`, and `i`, its place in the atlas
    "Look a subject up; an unknown one raises with the nearest names"
    if subject not in _index():
        from difflib import get_close_matches
        near = get_close_matches(subject, _index(), 5, 0.5)
        raise ValueError(f"expected one of {len(_entries())} subjects, got {subject!r}. "
                         + (f"Did you mean {', '.join(near)}?" if near else "See sdlearn.pocket.subjects()."))
    i = _index()[subject]
    return _entries()[i] | dict(i=i)

def cutout(
    subject:str,  # A name from `subjects()`
)->Image.Image:   # RGBA, 96x96, transparent around the subject
    "The subject alone, cut from the atlas"
    i, cols = find(subject)['i'], _sheet().width//cell
    x, y = i%cols*cell, i//cols*cell
    return _sheet().crop((x, y, x+cell, y+cell))

def article(
    name:str,  # A noun, e.g. "otter"
)->str:        # With its article, e.g. "an otter"; plurals and mass nouns stay as they are
    "a, an, or nothing"
    if re.search(r'(?<![su])s$|fries|people|bread|fire$|snow|wood$|broccoli|popcorn|sushi|bacon|garlic|^the ', name) and 'camp' not in name: return name
    return ('an ' if name[0].lower() in 'aeiou' and not re.match('uni|euro|one|ute', name.lower()) else 'a ')+name

def caption(
    subject:str,            # A name or keyword; used as it is
    style:str='plain',      # A key of `styles`
    background:str='white', # A key of `backgrounds`
    rng=None,               # numpy Generator that picks the wording; None takes the first
)->str:                     # For instance "a watercolor painting of an otter in the snow"
    "Words for a scene"
    pick = (lambda o: o[0]) if rng is None else (lambda o: o[rng.integers(len(o))])
    return pick(styles[style]).format(s=article(subject)+pick(backgrounds[background]))

# --- backgrounds: small vertical pictures made of gradients and a few shapes ------------------------------------------
def _gradient(*stops): # stops: (height 0..1, (r,g,b)); a 1-pixel wide column, stretched
    ys, cs = zip(*stops)
    y = np.linspace(0, 1, 64)
    col = np.stack([np.interp(y, ys, c) for c in np.array(cs, float).T], -1)
    return Image.fromarray(col.round().astype('uint8')[:, None]).resize((128, 128), Image.BILINEAR)

def _blobs(im, rng, n, color, size, y=(0, 1), tall=1): # soft ellipses, for clouds, trees, bubbles, stars
    d = ImageDraw.Draw(im)
    for _ in range(n):
        cx, cy, r = rng.uniform(0, 128), rng.uniform(*y)*128, rng.uniform(*size)
        d.ellipse((cx-r, cy-r*tall, cx+r, cy+r*tall), fill=color)
    return im

def _beach(r): return _blobs(_gradient((0,(120,200,250)),(.4,(190,230,250)),(.42,(40,150,200)),(.6,(90,200,210)),(.64,(245,225,170)),(1,(230,200,140))), r, 3, (255,255,255), (5,9), (.05,.2), .5)
def _snow(r): return _blobs(_gradient((0,(170,200,225)),(.55,(225,235,245)),(.6,(250,252,255)),(1,(215,228,242))), r, 14, (255,255,255), (1.5,3), (0,.6))
def _forest(r):
    im = _gradient((0,(140,190,150)),(.5,(60,120,70)),(.7,(40,90,45)),(1,(70,60,35)))
    d = ImageDraw.Draw(im)
    for x in np.arange(6, 128, 20)+r.uniform(-4, 4, 7)[:len(np.arange(6, 128, 20))]:
        d.rectangle((x-2, 60, x+2, 100), fill=(75,50,30)); d.polygon(((x-13,78),(x,8),(x+13,78)), fill=(25,85+int(r.uniform(0,30)),45))
    return im
def _night(r): return _blobs(_blobs(_gradient((0,(8,10,45)),(.7,(30,35,95)),(1,(20,25,50))), r, 16, (240,240,255), (.8,1.8)), r, 1, (250,240,190), (9,10), (.1,.18))
def _meadow(r): return _blobs(_gradient((0,(110,190,250)),(.45,(200,235,255)),(.5,(120,200,80)),(1,(50,140,50))), r, 12, (250,220,70), (1.5,2.5), (.6,1))
def _desert(r): return _blobs(_gradient((0,(250,200,120)),(.5,(255,230,180)),(.53,(220,150,80)),(1,(190,110,50))), r, 1, (255,245,200), (10,11), (.12,.2))
def _sunset(r): return _blobs(_gradient((0,(70,30,110)),(.35,(210,70,90)),(.6,(255,160,60)),(.64,(120,50,80)),(1,(40,20,60))), r, 1, (255,230,120), (14,15), (.5,.52))
def _ocean(r): return _blobs(_gradient((0,(90,210,230)),(.5,(20,110,180)),(1,(5,35,95))), r, 10, (170,230,245), (1.5,4))

_scenes = dict(beach=_beach, snow=_snow, forest=_forest, night=_night, meadow=_meadow, desert=_desert, sunset=_sunset, ocean=_ocean)
_colors = dict(white=(255,255,255), red=(215,45,45), blue=(45,95,215), green=(50,160,75), yellow=(250,205,60), purple=(125,65,175))

def backdrop(
    background:str,  # A key of `backgrounds`
    rng,             # numpy Generator: where the clouds, trees and stars are
)->Image.Image:      # RGB, 128x128
    "The scene behind the subject"
    if background in _scenes: return _scenes[background](rng)
    if background not in _colors: raise ValueError(f"expected a background among {', '.join(backgrounds)}, got {background!r}")
    return Image.new('RGB', (128, 128), _colors[background])

# --- styles: image operations --------------------------------------------------------------------------------------
def _array(im): return np.asarray(im, dtype=np.float32)/255
def _image(a): return Image.fromarray((a.clip(0, 1)*255).round().astype('uint8'))

@lru_cache
def _texture(kind, side=128): # one fixed sheet of paper or canvas, so that it can be learned
    g = np.random.default_rng(0)
    if kind == 'paper': # soft stains
        low = np.asarray(Image.fromarray((g.random((9, 9))*255).astype('uint8')).resize((side, side), Image.BICUBIC), np.float32)/255
        return low[..., None]
    y, x = np.mgrid[:side, :side]
    return (np.sin((x+y)*np.pi/4)*.5)[..., None].astype(np.float32) # diagonal brush strokes, 8 px apart

def _watercolor(im): # pale washes with soft borders and a darker rim, on stained paper
    soft = im.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(1))
    rim = _array(ImageChops.difference(soft.convert('L'), soft.convert('L').filter(ImageFilter.GaussianBlur(3))))[..., None]
    wash = 1-(1-_array(soft))*(.45+.45*_texture('paper'))
    return _image(wash-1.1*rim*(1.1-_array(soft)))

def _oil(im): # flat dabs, strong colours, strokes in relief
    a = _array(im.filter(ImageFilter.MedianFilter(7)).filter(ImageFilter.SMOOTH))
    grey = a.mean(-1, keepdims=True)
    return _image(((grey+1.4*(a-grey))*.9+_texture('strokes')*.07)*np.array([1, .97, .88], np.float32))

def _pencil(im): # colour dodge of the inverted blur: lines where brightness changes
    g = _array(im.convert('L')); blur = _array(Image.fromarray((255*(1-g)).astype('uint8')).filter(ImageFilter.GaussianBlur(2.5)))
    line = (g/np.maximum(1-blur, .04)).clip(0, 1)**1.5
    tone = .80+.2*g
    return _image(np.repeat((line*tone)[..., None], 3, -1)*np.array([.98, .97, .94], np.float32))

def _pixel(im): # 32x32 blocks and 6 shades per channel
    small = im.resize((32, 32), Image.BOX)
    return _image((_array(small)*5).round()/5).resize(im.size, Image.NEAREST)

_ops = {'plain': lambda im: im, 'watercolor': _watercolor, 'oil painting': _oil, 'pencil sketch': _pencil, 'pixel art': _pixel}

def stylize(
    im:Image.Image,  # RGB
    style:str,       # A key of `styles`
)->Image.Image:      # Same size
    "Redraw a picture in a style, by plain image operations"
    if style not in _ops: raise ValueError(f"expected a style among {', '.join(styles)}, got {style!r}")
    return _ops[style](im)

# --- scenes --------------------------------------------------------------------------------------------------------
def render(
    subject:str,            # A name from `subjects()` or one of its keywords
    style:str='plain',      # A key of `styles`
    background:str='white', # A key of `backgrounds`
    size:float=.8,          # Side of the subject as a share of the picture, 0..1
    position:tuple=(.5,.5), # Centre of the subject, x and y as shares of the picture
    seed:int=None,          # Varies wording, place, size and backdrop a little; None: the standard view
    side:int=128,           # Pixels
)->tuple:                   # (RGB picture, caption)
    "A training picture and its caption"
    rng = np.random.default_rng(0 if seed is None else seed)
    text = caption(subject, style, background, None if seed is None else rng)
    if seed is not None: size, position = size*rng.uniform(.94, 1.06), tuple(p+rng.uniform(-.03, .03) for p in position)
    im, s = backdrop(background, rng), max(1, round(size*128))
    sub = cutout(subject).resize((s, s), Image.LANCZOS)
    im.paste(sub, tuple(round(p*128-s/2) for p in position), sub)
    im = stylize(im, style)
    return (im if side==128 else im.resize((side, side), Image.LANCZOS)), text

def _share(*words): # a stable number in 0..1 for some words: no list to store, the same on every machine
    return int(hashlib.sha256('|'.join(words).encode()).hexdigest()[:8], 16)/16**8

def is_held_out(
    subject:str,    # First name of a subject
    style:str,      # A key of `styles`
    background:str, # A key of `backgrounds`
    share:float=.1, # Share of (subject, style) and of (subject, background) pairs kept out of training
)->bool:            # Never true of the plain picture on white
    "Is this scene kept out of training?"
    return ((style!='plain' and _share(subject, style)<share) or (background!='white' and _share(subject, background)<share))

def held_out(
    n:int=None,  # Only among the first `n` subjects
)->list:         # (subject, style, background): a style on white, or plain before a background
    "The pairs kept out of all training"
    pairs = [(s, st, 'white') for s in subjects(n) for st in styles]+[(s, 'plain', b) for s in subjects(n) for b in backgrounds]
    return [p for p in dict.fromkeys(pairs) if is_held_out(*p)]

# --- making the atlas from the font: needs Debian's fonts-noto-color-emoji and unicode-cldr-core -----------------------
core_subjects = '''🐶puppy,dog,dog face|🐱cat,kitten,cat face|🐼panda,panda bear|🦦otter|🦜parrot,macaw|🦒giraffe|🔥campfire,fire,flame|🧑‍🚀astronaut|🐎horse|🧸teddy bear,teddy
🎩top hat|🐙octopus|🌻sunflower|🌹rose|🍎apple,red apple|🍌banana|🚗car,automobile|🚲bicycle,bike|🚀rocket|✈airplane,plane|⛵sailboat,boat|🎸guitar|🦊fox|🐺wolf|🦁lion|🐯tiger|🐻bear|🐨koala
🐰rabbit,bunny|🐭mouse|🐹hamster|🐸frog|🐷pig|🐮cow|🐵monkey|🐔chicken|🐧penguin|🦉owl|🦆duck|🦅eagle|🦩flamingo|🦚peacock|🐢turtle|🐍snake|🐳whale|🐬dolphin|🐟fish|🦈shark
🦀crab|🐌snail|🦋butterfly|🐝bee,honeybee|🐞ladybug,lady beetle|🐘elephant|🦓zebra|🦄unicorn|🐑sheep,ewe|🦔hedgehog|🦝raccoon|🦥sloth|🐉dragon|🦖dinosaur,T-Rex|🌵cactus|🌲pine tree,evergreen tree|🌴palm tree|🍄mushroom
🍓strawberry|🍉watermelon|🍊orange,tangerine|🍋lemon|🍍pineapple|🍇grapes|🍒cherries|🥑avocado|🥕carrot|🌽corn,ear of corn|🍕pizza|🍔burger,hamburger|🍩donut,doughnut|🎂birthday cake,cake|🧁cupcake|🍦ice cream|☕coffee,cup of coffee,hot beverage|🫖teapot
🏠house|🏰castle|🌋volcano|⛺tent|🚂train,steam train,locomotive|🚌bus|🚜tractor|🚒fire truck,fire engine|🚁helicopter|🛸flying saucer,ufo|⚽soccer ball,football|🏀basketball|🎈balloon|🎁gift,present,wrapped gift|🎄Christmas tree|⛄snowman
👑crown|👟sneaker,running shoe|⏰alarm clock,clock|📷camera|💡light bulb|📚books|🎻violin|🥁drum|💎diamond,gem,gem stone|🤖robot|👻ghost|👽alien|💀skull|🎃pumpkin,jack-o-lantern|🌈rainbow|🌞sun,sun with face|🌙moon,crescent moon|⭐star'''
look_alikes = set('🐕🐈🐅🐴🐄🐖🐇🐁🐲🐋🐒🦮🐣🐥🍏🌝🌚🌛🌜🌑🌒🌓🌔🌖🌗🌘🌕☀🌟✨🚄🚅🚃🚆🚇🚈🚉🚊🚝🚞🚋🚎🚐🚔🚖🚘🚍🌍🌎🌏🐪💮🕛🔉🔈🔇🔕🎶🔎🔒🔓🔏🔐📘📗📙📕📔📓🧡💛💚💙💜🤎🖤🤍💗💓💞💕💟♥💖🌥🌤🌨🌩🌧🌦⏳📂📆📄📃🗒🥈🥉📉📈💶💷💴📤📥📨⛷⚒🛫🛬🌄🌇🌃🌆☃🛥⛴👥☔⛱☂🌂📀💿')
_skip = re.compile(r"skin tone|flag|keycap|arrow|button|\bmen\b|\bwomen\b|\bman\b|\bwoman\b|o’clock|thirty|square|circle|diamond$|triangle|: (red|curly|white) hair|: bald"
                   r"|face|sign$|sign |symbol|index|\bhand|\bfist|\bno |^no|suit$|grinning|smiling| cat$|monkey$|person|people|kiss|couple|bubble$|question|exclamation|asterisk|mark$|"
                   r"pointed|loop|heart$|hair$|bald|vertical|horizontal|middle finger|hundred|ZZZ|silhouette")

def atlas_entries(
    cldr:Path='/usr/share/unicode/cldr/common', # Unicode CLDR, with annotations/en.xml
)->list:                                        # {char, names}, the core subjects first
    "Choose the subjects and their names from CLDR's names and keywords"
    names, words = {}, {}
    for part in ('annotations', 'annotationsDerived'):
        for char, tts, text in re.findall(r'<annotation cp="([^"]+)"( type="tts")?>([^<]*)<', (Path(cldr)/part/'en.xml').read_text()):
            if tts: names[char] = html.unescape(text)
            else: words[char] = html.unescape(text).split(' | ')
    core = [(e[:len(e)-len(e.lstrip(''.join(set(e)-set('abcdefghijklmnopqrstuvwxyzTCRX-, '))))], e) for e in core_subjects.replace('\n', '|').split('|')]
    core = [dict(char=c, names=e[len(c):].split(',')) for c, e in core]
    used = {n for e in core for n in e['names']}
    order = list(names); first, animals, signs = map(order.index, '😀🐵🏧')
    order = order[animals:signs]+[*'🪩🪷🪸🪹🪺🛝🛞🛟🫘🫙🧌']+order[first:animals] # things before faces and people
    rest = [c for c in order if c not in {e['char'] for e in core}|look_alikes and not _skip.search(names[c]) and names[c] not in used]
    count = {}
    for c in rest:
        for w in set(words.get(c, [])): count[w] = count.get(w, 0)+1
    for c in rest:
        extra = [w for w in words.get(c, []) if count[w]==1 and w not in used and re.fullmatch('[a-z][a-z -]{2,20}', w) and (w in names[c] or names[c] in w)]
        core.append(dict(char=c, names=list(dict.fromkeys([names[c]]+extra)))); used |= {names[c], *extra}
    return core

def make_atlas(
    out:Path=folder,                                                       # Gets atlas.webp and subjects.json
    font:Path='/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf',         # Noto Color Emoji, with bitmaps of 136x128
    cldr:Path='/usr/share/unicode/cldr/common',                            # Unicode CLDR
    cols:int=32,                                                           # Subjects in a row of the atlas
)->int:                                                                    # Number of subjects
    "Render every subject once from the font; characters the font lacks are left out"
    face, pics, entries = ImageFont.truetype(str(font), 109), [], []
    def draw(char):
        im = Image.new('RGBA', (300, 150)); ImageDraw.Draw(im).text((0, 10), char, font=face, embedded_color=True); return im
    missing, seen = draw('\U0010ffff').tobytes(), set()
    for e in atlas_entries(cldr):
        im = draw(e['char'])
        box = im.getbbox()
        if not box or box[2]>150 or im.tobytes()==missing or im.tobytes() in seen: continue
        seen.add(im.tobytes()); im = ImageOps.pad(im.crop(box), (cell, cell), Image.LANCZOS)
        if np.asarray(im)[..., 3].max()==0 : continue
        pics.append(im); entries.append(e)
    sheet = Image.new('RGBA', (cols*cell, -(-len(pics)//cols)*cell))
    for i, im in enumerate(pics): sheet.paste(im, (i%cols*cell, i//cols*cell))
    Path(out).mkdir(parents=True, exist_ok=True)
    sheet.save(Path(out)/'atlas.webp', lossless=True, quality=100, method=6, exact=False)
    (Path(out)/'subjects.json').write_text('[\n'+',\n'.join(json.dumps(e, ensure_ascii=False) for e in entries)+'\n]\n')
    return len(entries)
