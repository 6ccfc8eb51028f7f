"Checks in seconds, no training: structure, tiny networks, samplers, schedules, the recipe's losses"
import ast, builtins, configparser, copy, importlib, importlib.util, io, itertools, json, math, multiprocessing, os, pickle, re, shutil, subprocess, sys
import threading
from dataclasses import replace
from pathlib import Path
import pytest, torch
from torch.testing import assert_close

root = Path(__file__).parent.parent
package = root/'sdlearn'
notebooks = sorted(p for p in (root/'nbs').glob('*.ipynb'))
lessons = [p for p in notebooks if p.stem!='index']
torch.set_num_threads(1)    # tiny tensors: a second thread only gets in the way

def cells(path, kind='code'):
    "(id, source) of a notebook's cells"
    nb = json.loads(path.read_text(encoding='utf8'))
    return [(c['id'], ''.join(c['source'])) for c in nb['cells'] if c['cell_type']==kind]

# ---------------------------------------------------------------- structure

rooms = '''configs core folders train tokenizer attention text vae schedule unet guidance denoiser adapt.inversion adapt.lora schedulers
    sample fast.progressive fast.guided fast.student fast.consistency fast.cache fast.export load fast.speed fast.decoder pipeline adapt.imagic
    idea.score idea.noise idea.steps idea.classes idea.autoencoder idea.contrast judge adapt.dreambooth pocket.atlas pocket.emoji
    pocket.backdrops pocket.looks pocket.captions pocket.scenes adapt.finetune pocket.card
    pocket.pictures pocket.codec pocket.recipe pocket.evaluate adapt.which pocket.__main__ infotext explore page cli __main__ bench'''.split()  # from the ground up

def imports(path):
    "Rooms of this package that a module imports, wherever it does"
    name = '.'.join(path.relative_to(package).with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text(encoding='utf8'))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('sdlearn')):
            base = name.split('.')[:-node.level] if node.level else []
            module = '.'.join([*base, *(node.module or '').removeprefix('sdlearn').strip('.').split('.')]).strip('.')
            for alias in node.names:
                inner = f'{module}.{alias.name}'.strip('.')
                yield inner if inner in rooms else module

def test_imports_run_one_way():
    for path in package.rglob('*.py'):
        name = '.'.join(path.relative_to(package).with_suffix('').parts)
        if path.name in ('__init__.py', '_modidx.py'): continue
        assert name in rooms, f'{name} has no place in the list of rooms'
        for other in imports(path):
            if other in ('', 'pocket', 'idea', 'adapt', 'fast'): continue
            assert rooms.index(other)<rooms.index(name), f'{name} imports {other}, which stands above it'

def test_a_notebook_exports_the_module_of_its_name():
    for path in lessons:
        title = next(s for _, s in cells(path, 'markdown')).split('\n')[0].removeprefix('# ')
        name = path.stem.split('_', 1)[1]
        assert title.lower().replace(' ', '_')==name, f'{path.name} is called {title!r}'
        exported = [m[1] for _, s in cells(path) for m in re.finditer(r'#\| default_exp (\S+)', s)]
        for module in exported: assert module.split('.')[-1]==name, f'{path.name} exports {module}'

def test_the_oldest_python_can_have_the_pins():
    from configparser import ConfigParser
    from importlib.metadata import metadata
    from packaging.specifiers import SpecifierSet
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf8')
    oldest = ini['DEFAULT']['min_python']
    pins = dict(re.findall(r'^([\w-]+)==([\d.]+)$', (root/'constraints.txt').read_text(encoding='utf8'), re.M))
    for name, version in pins.items():
        said = metadata(name)
        if said['Version'].split('+')[0]!=version: continue    # another stack is tried
        assert oldest in SpecifierSet(said['Requires-Python'] or ''), f"{name} {version} wants Python {said['Requires-Python']}"
    versions = re.findall(r'"(3\.\d+)"', (root/'.github'/'workflows'/'test.yaml').read_text(encoding='utf8'))
    assert min(versions, key=lambda v: int(v[2:]))==oldest
    for file in ('README.md', 'pyproject.toml'): assert re.search(rf'(Python |>=){re.escape(oldest)}\b', (root/file).read_text(encoding='utf8')), file

def stored(node):
    "Names that a statement gives to its notebook"
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)): return {a.asname or a.name.split('.')[0] for a in node.names}
    inner = {n for child in ast.iter_child_nodes(node) for n in stored(child)}
    if isinstance(node, ast.ExceptHandler): inner |= {node.name}
    return inner|({node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set())

def loaded(node):
    "Names that it asks its notebook for"
    if isinstance(node, ast.Name): return {node.id} if isinstance(node.ctx, ast.Load) else set()
    asked = {n for child in ast.iter_child_nodes(node) for n in loaded(child)}
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)): return asked
    inner = [n for n in ast.walk(node) if n is not node]        # what it has by itself
    return asked-{n.arg for n in inner if isinstance(n, ast.arg)}-{n for child in inner for n in stored(child)}

def needs(names, functions):
    "Those, and what the functions among them need"
    found, todo = set(), [*names]
    while todo:
        name = todo.pop()
        if name in found: continue
        found.add(name)
        todo += functions.get(name, ())
    return found

def test_a_cell_needs_nothing_that_comes_later():
    known = {*dir(builtins), 'display', 'get_ipython', '__file__', '__name__'}
    for path in lessons:
        plain = [(c, '\n'.join(re.sub(r'^(\s*)[%!].*', r'\1pass', l) for l in s.split('\n'))) for c, s in cells(path)]
        steps = [(c, node) for c, s in plain for node in ast.parse(s).body]
        functions, first = {}, {}
        for i, (_, node) in enumerate(steps):
            for name in stored(node): first.setdefault(name, i)
        for i, (cell, node) in enumerate(steps):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                # which methods of a class are called is not seen here
                functions[node.name] = loaded(node) if isinstance(node, ast.FunctionDef) else set()
                continue
            late = [n for n in needs(loaded(node), functions)-known if first.get(n, i+1)>i]
            assert not late, f'{path.name} {cell} needs {late}, which come later or never'

def test_badges_and_install_cells_follow_the_address():
    from importlib.machinery import SourceFileLoader
    loader = SourceFileLoader('address', str(root/'.ci'/'address'))
    tool = importlib.util.module_from_spec(importlib.util.spec_from_loader('address', loader))
    loader.exec_module(tool)
    for path in lessons:
        first = cells(path, 'markdown')[0][1]
        assert tool.with_badge(first, path.name)==first, f'{path.name}: run .ci/address'
        for cell, source in cells(path): assert tool.with_install(source)==source, f'{path.name} {cell}: run .ci/address'
    tool.address = lambda: ('https://github.com/somebody/sdlearn', 'main', 'sdlearn')
    badge = tool.with_badge('# A lesson', '10_using.ipynb')
    assert badge.endswith('(https://colab.research.google.com/github/somebody/sdlearn/blob/main/nbs/10_using.ipynb)')
    assert tool.with_install('%pip install -q sdlearn')=='%pip install -q git+https://github.com/somebody/sdlearn'
    tool.address = lambda: ('', 'main', 'sdlearn')
    assert tool.with_badge(badge, '10_using.ipynb')=='# A lesson'

def test_links_lead_somewhere():
    for path in notebooks:
        for _, s in cells(path, 'markdown'):
            for link in re.findall(r'\]\((?!http|#)([^)#]+)', s):
                assert (path.parent/link).exists(), f'{path.name} links to {link}, which does not exist'

def test_pictures_of_lessons_are_told_in_words():
    for path in lessons:
        if path.name[0]=='9': continue
        for cell in json.loads(path.read_text(encoding='utf8'))['cells']:
            for out in cell.get('outputs', ()):
                for kind in [k for k in out.get('data', {}) if k.startswith('image/')]:
                    said = out['metadata'].get(kind, {})
                    assert said.get('alt'), f"{path.name} {cell['id']}: show_images and show_figure take alt="

# ---------------------------------------------------------------- fewer steps

def trailing():
    from dataclasses import replace
    from sdlearn.schedule import SD_V1
    return replace(SD_V1, timestep_spacing='trailing')

def gauss(x, sigma, t=None, cond=None): # pictures of std 1
    from sdlearn.schedule import sigma_like
    sigma = sigma_like(sigma, x)
    return sigma*x/(sigma**2+1)

def test_one_step_of_the_student_ends_where_two_of_the_teacher_do():
    from sdlearn.fast.progressive import make_task, nested_plans, one_step_target, two_steps
    from sdlearn.sample import ddim, make_plan
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    end = [*ddim(gauss, x, [9., 2., .5])][-1].x_next
    assert_close(two_steps(gauss, x, (9., 2., .5), (0, 0)), end)
    target = one_step_target(x, end, 9., .5)
    assert_close([*ddim(lambda z, s, t: (z-target)/s, x, [9., .5])][-1].x_next, end)
    assert_close(one_step_target(x, end, torch.tensor([9.]*3), torch.tensor([.5]*3)), target)
    with pytest.raises(ValueError, match='smaller sigma'): one_step_target(x, end, .5, 9.)
    teacher, student = nested_plans(4, trailing())
    assert student.timesteps==[999, 749, 499, 249] and teacher.timesteps[::2]==student.timesteps
    assert teacher.sigmas[::2]==student.sigmas
    asked = []
    def watched(x, sigma, t, cond):
        asked.append((sigma, t, cond))
        return gauss(x, sigma)
    cond = torch.arange(40)
    task = make_task(watched, torch.randn(40, 1, 2, 2), cond, teacher, torch.Generator().manual_seed(0))
    at = [teacher.timesteps.index(t) for t in task.t.tolist()]
    assert {*at}=={0, 2, 4, 6} and torch.equal(task.cond, cond) and task.x0.shape==(40, 1, 2, 2)
    for j, (sigma, t, told) in enumerate(asked):
        assert told is cond and t.tolist()==[teacher.timesteps[k+j] for k in at]
        assert_close(sigma, torch.tensor([teacher.sigmas[k+j] for k in at]))
    top = task.sigma[:, None, None, None]
    x = task.x0+top*task.noise                           # from here one step lands where two do
    low = [torch.tensor([teacher.sigmas[k+j] for k in at]) for j in range(3)]
    assert_close(task.x0+low[2][:, None, None, None]*task.noise, two_steps(gauss, x, low, (0, 0)), atol=1e-4, rtol=1e-4)
    for bad in (make_plan('euler', 8), make_plan('ddim', 5, trailing()), None):
        with pytest.raises(ValueError, match='even number of steps of ddim'): make_task(gauss, x, None, bad, None)

def test_stops_that_do_not_nest_are_refused():
    from dataclasses import replace
    from sdlearn.fast.progressive import nested_plans
    for n in (1, 2, 3, 7, 16, 50, 500): assert len(nested_plans(n, trailing())[0].timesteps)==2*n
    for spacing in ('leading', 'linspace', None):
        with pytest.raises(ValueError, match="every second stop.*'trailing'"): nested_plans(4, replace(trailing(), timestep_spacing=spacing))

def test_a_mistake_costs_a_student_the_same_whatever_it_says():
    from sdlearn.denoiser import velocity
    from sdlearn.fast.progressive import Task, error_weight, halving_loss, truncated_snr
    sigma = torch.tensor([.1, .5, 1., 2., 14.6])
    assert_close(truncated_snr(sigma), torch.tensor([100., 4., 1., 1., 1.]))
    assert_close(error_weight(sigma), torch.tensor([1., 1., 1., 4., 14.6**2]))
    x0, noise, wrong = torch.randn(3, 5, 1, 4, 4)
    s = sigma[:, None, None, None]
    x, t = x0+s*noise, torch.arange(5)
    wrong_noise = (x-wrong)/s
    want = (truncated_snr(sigma)*(wrong-x0).square().mean((1, 2, 3))).mean()
    said = dict(epsilon=wrong_noise, v_prediction=velocity(wrong, wrong_noise, sigma))
    for kind, answer in said.items():
        def ask(net, x_in, sigma, t_, cond):
            assert net=='net' and t_ is t and cond=='words'
            assert_close(x_in, x/(s**2+1)**.5)
            return answer
        loss = halving_loss(lambda g: Task(x0, noise, sigma, t, 'words'), ask, kind)('net', None)
        assert_close(loss, want, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match='v_prediction'): halving_loss(None, None, 'x0')

def test_a_guided_teacher_says_what_the_pipeline_asks():
    from dataclasses import replace
    from sdlearn.denoiser import noise_predictor
    from sdlearn.fast.progressive import guided_teacher
    from sdlearn.load import load_sd
    sd = load_sd(networks='own')
    words, nothing = torch.randn(2, 77, 128), torch.randn(1, 77, 128)
    x = 3*torch.randn(2, 4, 16, 16)
    for scale, kind in ((0, 'epsilon'), (1, 'epsilon'), (4, 'epsilon'), (4, 'v_prediction')):
        sd.schedule = replace(sd.schedule, prediction_type=kind)
        with torch.no_grad():
            said = guided_teacher(sd.unet, nothing, scale, kind)(x, torch.tensor([3., 3.]), torch.tensor([700, 700]), words)
            want = noise_predictor(sd, torch.cat([nothing, nothing, words]), scale)(x, 3., 700)
        assert_close(said, want, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match='guidance_scale'): guided_teacher(sd.unet, nothing, -1)

def test_both_answers_of_guidance_come_from_one_call():
    from sdlearn.fast.progressive import guided_answer, two_answers
    asked = []
    def ask(net, x_in, t, told):
        asked.append((len(x_in), t.tolist()))
        return x_in+told[:, :, None, None]
    x, t, told = torch.zeros(2, 1, 1, 1), torch.tensor([3, 4]), torch.tensor([[0.], [0.], [1.], [2.]])
    uncond, text = two_answers('net', x, t, told, ask)
    assert uncond.flatten().tolist()==[0, 0] and text.flatten().tolist()==[1, 2]
    assert guided_answer('net', x, t, told, 3., ask).flatten().tolist()==[3, 6]
    assert guided_answer('net', x, t, told, 1, ask).flatten().tolist()==[1, 2]     # off: the words alone
    assert asked==[(4, [3, 4, 3, 4])]*2+[(2, [3, 4])]

def test_a_student_begins_as_its_teacher_which_stays_as_it_is():
    from sdlearn.fast.progressive import halve
    net = torch.nn.Linear(2, 2).requires_grad_(False)
    before = net.weight.clone()
    same = halve(net, lambda net, g: net.weight.sum(), 0)
    other = halve(net, lambda net, g: net.weight.sum(), 3, warmup=0)
    assert torch.equal(net.weight, before) and torch.equal(same.weight, before)
    assert (other.weight<before).all() and not other.weight.requires_grad

def test_notebooks_are_small_and_films_are_short():
    for path in notebooks:
        outputs = [o for c in json.loads(path.read_text(encoding='utf8'))['cells'] for o in c.get('outputs', ())]
        films = [len(''.join(o['data']['image/gif'])) for o in outputs if 'image/gif' in o.get('data', {})]
        assert path.stat().st_size-sum(films)<300_000, path.name
        assert all(3*n/4<300_000 for n in films), path.name     # base64 takes four letters for three bytes

def test_kept_pictures_fit_the_page():
    # a column of text is some 800 pixels wide: what is wider is shown smaller, and small pictures cannot be seen
    import base64, io
    from PIL import Image
    for path in notebooks:
        for c in json.loads(path.read_text(encoding='utf8'))['cells']:
            for o in c.get('outputs', ()):
                for kind in ('image/png', 'image/jpeg', 'image/gif'):
                    if kind not in o.get('data', {}): continue
                    wide = Image.open(io.BytesIO(base64.b64decode(''.join(o['data'][kind])))).width
                    wide = o['metadata'].get(kind, {}).get('width', wide)
                    assert wide<=820, f"{path.name} {c['id']}: {wide} pixels"

def test_no_lesson_keeps_a_failure():
    for path in notebooks:
        kept = [o['output_type'] for c in json.loads(path.read_text(encoding='utf8'))['cells'] for o in c.get('outputs', ())]
        assert 'error' not in kept, path.name

def test_lines_fit_and_statements_stand_alone():
    import io, tokenize
    for path in notebooks:
        for cell, source in cells(path):
            for line in source.split('\n'): assert len(line)<=100, f'{path.name} {cell}: {line}'
            code = re.sub(r'(?m)^(\s*)[%!].*$', r'\1pass', source)
            for t in tokenize.generate_tokens(io.StringIO(code).readline):
                joined = t.type==tokenize.OP and t.string==';'
                assert not joined, f'{path.name} {cell}: two statements in one line: {t.line.strip()}'

def test_modules_are_what_the_notebooks_export(tmp_path):
    pytest.importorskip('nbdev')
    for name in ('nbs', 'sdlearn'):
        shutil.copytree(root/name, tmp_path/name, ignore=shutil.ignore_patterns('checkpoint', 'atlas', '__pycache__'))
    for name in ('settings.ini', 'pyproject.toml', 'README.md', 'setup.py'): shutil.copy(root/name, tmp_path)
    env = {k: v for k, v in os.environ.items() if k!='IN_TEST'}
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
                   cwd=tmp_path, check=True, env=env, capture_output=True)
    for path in package.rglob('*.py'):
        new = (tmp_path/'sdlearn'/path.relative_to(package)).read_text(encoding='utf8')
        assert new==path.read_text(encoding='utf8'), f'{path.name} is not what its notebook exports: nbdev_export'

def test_nbdevs_docs_show_a_lesson_as_it_is():
    # by default nbdev_docs runs exports and cells with imports, on their own, and puts a signature in the place of
    # exported code; `skip_procs` of settings.ini says no to that: here the code is the lesson
    process = pytest.importorskip('nbdev.processors').FilterDefaults()
    from nbdev.process import read_nb
    def code(text): return re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip()
    for path in notebooks:
        nb = read_nb(path)
        shown = [(code(c.source), len(c.outputs)) for c in nb.cells if c.cell_type=='code' and not
                 re.search(r'^#\| *hide *$|^ *%', c.source, re.M) and code(c.source)]
        process(nb)
        told = [(code(c.source), len(c.outputs)) for c in nb.cells if c.cell_type=='code']
        assert [t for t in told if t[0]]==shown, f'{path.name}: another lesson after the processing for nbdev_docs'

def test_version_is_said_once():
    ini = configparser.ConfigParser()
    ini.read(root/'settings.ini', encoding='utf8')
    import sdlearn
    assert sdlearn.__version__==ini['DEFAULT']['version']

def test_package_stands_without_the_development_tools():
    for path in package.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf8'))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            assert not {n.split('.')[0] for n in names}&{'nbdev', 'fastcore', 'execnb', 'torchvision', 'sklearn'}, path.name
        assert '.cuda()' not in path.read_text(encoding='utf8'), path.name

def test_names_of_before_are_where_they_were():
    known = json.loads((root/'.ci'/'names.json').read_text(encoding='utf8'))
    for module, names in known.items():
        found = importlib.import_module(f'sdlearn.{module}')
        for name in names: assert hasattr(found, name) and name in found.__all__, f'{module}.{name}'

def test_a_bare_import_is_light_and_lists_its_rooms():
    code = ("import sys, sdlearn; assert 'torch' not in sys.modules; assert 'pipeline' in dir(sdlearn);"
            "assert 'otter' in sdlearn.pocket.subjects() and 'txt2img' in dir(sdlearn)")
    env = os.environ|dict(PYTHONUTF8='0', LC_ALL='POSIX')       # as on a machine that does not speak UTF-8
    subprocess.run([sys.executable, '-c', code], check=True, env=env, cwd=root)

# ---------------------------------------------------------------- pocket's data

def words_of(s): return '|'.join(map(str, (s.subject, s.style, s.background, s.color, s.size, s.place, s.count, s.close_up,
                                           s.relation, s.other, s.other_color, s.seed)))

def fingerprint(texts):
    import hashlib
    return hashlib.sha256('\n'.join(texts).encode()).hexdigest()

def quarters(im):
    "Mean colours of a picture's four quarters: enough to notice another layout, whatever the version of Pillow"
    import numpy as np
    return np.asarray(im, float).reshape(2, 64, 2, 64, 3).mean((1, 3)).ravel()

def test_scenes_are_those_that_pocket_was_trained_on():
    import numpy as np
    from sdlearn.pocket.scenes import caption, draw, held_out, scene
    golden = json.loads((root/'.ci'/'scenes.json').read_text(encoding='utf8'))
    scenes = [scene(i) for i in range(300)]
    assert fingerprint(map(words_of, scenes))==golden['scenes'] and fingerprint(map(caption, scenes))==golden['captions']
    assert fingerprint(map(words_of, held_out()))==golden['held_out']
    seen = np.stack([quarters(draw(s)) for s in scenes[:240]])
    want = np.frombuffer(bytes.fromhex(golden['quarters']), np.uint8).reshape(seen.shape)
    assert np.abs(seen-want).max()<2.5, scenes[int(np.abs(seen-want).max(1).argmax())]

def test_atlas_in_the_box_is_whole():
    from sdlearn.pocket.atlas import check_atlas, cutout, find, folder, read_sheet, read_subjects
    check_atlas()
    who = read_subjects()
    for unseen in (False, True):                       # no gap, no overlap, nothing left over
        mine = [s for s in who if s.unseen==unseen]
        assert [s.at for s in mine]==[sum(len(t.designs) for t in mine[:i]) for i in range(len(mine))]
        assert read_sheet(unseen=unseen).mode=='RGBA'
    assert sum(f.stat().st_size for f in folder.iterdir())<14e6
    assert (find('kitten').names[0], cutout('cat', 'twemoji').tobytes())==('cat', cutout('kitten', 2).tobytes())

# ---------------------------------------------------------------- networks

def randomized(net, seed=0):
    "Random weights, every one of them, so that no two names can be mixed up"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.1+(p.ndim==1)*.5)
    return net.eval().requires_grad_(False)

@pytest.mark.parametrize('shape', [dict(channels=(8, 16), layers=1, heads=2), dict(channels=(8, 16, 16), layers=2, heads=4)])
@torch.no_grad()
def test_unet_equals_diffusers(shape):
    from diffusers import UNet2DConditionModel
    from sdlearn.unet import UNet
    n = len(shape['channels'])
    config = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=shape['channels'], norm_num_groups=4,
                  layers_per_block=shape['layers'], cross_attention_dim=12, attention_head_dim=shape['heads'],
                  down_block_types=('CrossAttnDownBlock2D',)*(n-1)+('DownBlock2D',),
                  up_block_types=('UpBlock2D',)+('CrossAttnUpBlock2D',)*(n-1))
    theirs = randomized(UNet2DConditionModel(**config))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, words = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 12)
    for t in (0, 500.25, 999, torch.tensor([3, 700])):
        assert_close(ours(x, t, words), theirs(x, t, words).sample, rtol=1e-4, atol=1e-4)

@torch.no_grad()
def test_vae_equals_diffusers():
    from diffusers import AutoencoderKL
    from sdlearn.vae import VAE, encode
    config = dict(block_out_channels=(8, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4, sample_size=16,
                  down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2)
    theirs = randomized(AutoencoderKL(**config))
    ours = VAE(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 8, 12)
    assert_close(ours.quant_conv(ours.encoder(x)), theirs.quant_conv(theirs.encoder(x)), rtol=1e-4, atol=1e-4)
    assert_close(ours.decoder(ours.post_quant_conv(z)), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)
    image, seed = x.clamp(-1, 1), lambda: torch.Generator().manual_seed(3)
    point = theirs.encode(image).latent_dist.sample(seed())*theirs.config.scaling_factor
    assert_close(encode(ours, image, seed()), point, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
@torch.no_grad()
def test_text_encoder_equals_transformers(act):
    from transformers import CLIPTextConfig, CLIPTextModel
    from sdlearn.text import TextEncoder, flat_keys, get_input_embeds, get_output_embeds
    config = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                  max_position_embeddings=10, hidden_act=act, bos_token_id=48, eos_token_id=49, pad_token_id=49)
    theirs = randomized(CLIPTextModel(CLIPTextConfig(**config)))
    ours = TextEncoder(config).eval()
    ours.load_state_dict(flat_keys(theirs.state_dict()))
    ids = torch.randint(0, 48, (3, 10))
    expected = theirs(ids).last_hidden_state
    assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4)
    for net in (ours, theirs):
        assert_close(get_output_embeds(net, get_input_embeds(net, ids)), expected, rtol=1e-4, atol=1e-4)

@torch.no_grad()
def test_a_prepared_unet_is_the_plain_one_for_any_words():
    from sdlearn.unet import UNet, prepare
    plain = randomized(UNet(dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                                 cross_attention_dim=12, attention_head_dim=2, in_channels=4, out_channels=4,
                                 down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
                                 up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))))
    for p in plain.parameters(): p.mul_(3)          # or every place would look everywhere alike
    quick, x = prepare(plain), torch.randn(2, 4, 8, 8)
    for words in torch.randn(2, 2, 7, 12):
        for t in (900, 3): assert_close(quick(x, t, words), plain(x, t, words), rtol=1e-3, atol=1e-3)
    with torch.enable_grad():                       # every weight gets its gradient
        for p in plain.parameters(): p.requires_grad_(True)
        quick(x, 3, words).square().mean().backward()
    assert all(p.grad is not None for p in plain.parameters())
    plain.mid_block.resnets[0].conv1 = torch.nn.Conv2d(16, 16, 3, padding=1)
    assert_close(quick(x, 3, words), plain(x, 3, words), rtol=1e-3, atol=1e-3)      # another layer, the same t

# ---------------------------------------------------------------- schedules and samplers

from sdlearn.sample import make_plan, noise_from, sample, samplers      # noqa: E402
from sdlearn.schedule import SD_V1, Schedule, read_schedule, sigma_at, timesteps  # noqa: E402

def test_the_numbers_of_sd_v1():
    assert [round(sigma_at(t), 4) for t in (0, 927.6429, 999)]==[.0292, 9.6826, 14.6146]
    assert [round(t, 4) for t in timesteps(15)[:3].tolist()]==[999., 927.6429, 856.2857]
    assert read_schedule({})==SD_V1==Schedule()

@pytest.mark.parametrize('spacing', ['linspace', 'leading', 'trailing'])
def test_a_schedule_is_read_as_diffusers_reads_it(spacing):
    import diffusers
    config = dict(beta_start=.0005, beta_end=.015, beta_schedule='linear', timestep_spacing=spacing, steps_offset=1,
                  set_alpha_to_one=True, clip_sample=False)
    schedule = read_schedule(config)
    for name, kind in dict(euler='EulerDiscrete', dpmpp_2m='DPMSolverMultistep', ddim='DDIM', lms='LMSDiscrete').items():
        theirs = getattr(diffusers, kind+'Scheduler').from_config(config)
        theirs.set_timesteps(10)
        plan = make_plan(name, 10, schedule)
        assert_close(torch.tensor(plan.timesteps), theirs.timesteps.float(), rtol=0, atol=1e-3)
        by_object = make_plan(theirs, 10, schedule)
        assert_close(torch.tensor(plan.sigmas), torch.tensor(by_object.sigmas), rtol=1e-4, atol=1e-4)
        assert math.isclose(plan.start_std, by_object.start_std, rel_tol=1e-4)

@pytest.mark.parametrize('odd', [dict(prediction_type='sample'), dict(beta_schedule='squaredcos_cap_v2'),
                                 dict(rescale_betas_zero_snr=True), dict(use_karras_sigmas=True),
                                 dict(timestep_spacing='even')])
def test_what_we_do_not_know_is_refused_by_name(odd):
    with pytest.raises(ValueError, match=next(iter(odd))): read_schedule(odd)

def last(plan, eps_fn, x, seeds=None):
    noise_fn = noise_from([torch.Generator().manual_seed(s) for s in seeds]) if seeds else None
    return [*sample(plan, eps_fn, x, noise_fn)][-1].x_next

@pytest.mark.parametrize('name', samplers)
def test_one_picture_is_hit(name):
    picture = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for k in (0, 3):
        plan = make_plan(name, 8).after(k)
        x = plan.start(noise, picture if k else None)
        steps = list(sample(plan, lambda x, sigma, t: (x-picture)/sigma, x))
        assert len(steps)==plan.calls
        end = steps[-1].x_next*(plan.sigmas[-1]**2+1)**.5          # as diffusers returns it
        level = plan.sigmas[-1]
        assert_close(end, picture.expand_as(end), rtol=0, atol=1e-4+4*level)

orders = dict(euler=1, ddim=1, heun=2, lms=2, pndm=3, dpmpp_2m=2, unipc=3)

@pytest.mark.parametrize('name', orders)
def test_order_of_convergence(name):
    rule, start = samplers[name].fn, torch.tensor([2.], dtype=torch.float64)
    def error(n):
        sigmas = torch.linspace(2, .5, n+1, dtype=torch.float64).tolist()
        end = [*rule(lambda x, sigma, t: sigma*x/(sigma**2+1), start, sigmas)][-1].x_next.item()
        return abs(end-2*((.5**2+1)/(2**2+1))**.5)
    assert abs(math.log2(error(80)/error(320))/2-orders[name])<.15

@pytest.mark.parametrize('name', ['ddpm', 'euler_ancestral'])
def test_fresh_noise_goes_on_from_the_generator_of_the_start(name):
    import diffusers
    kind = dict(ddpm='DDPM', euler_ancestral='EulerAncestralDiscrete')[name]
    config = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', steps_offset=1, clip_sample=False)
    theirs, g = getattr(diffusers, kind+'Scheduler').from_config(config), torch.Generator().manual_seed(7)
    theirs.set_timesteps(6)
    y = torch.randn(1, 4, 4, 4, generator=g)*theirs.init_noise_sigma
    for t in theirs.timesteps: y = theirs.step(.5*theirs.scale_model_input(y, t), t, y, generator=g).prev_sample
    plan, noise_fn = make_plan(name, 6), noise_from([torch.Generator().manual_seed(7)])
    x = plan.start(noise_fn(torch.empty(1, 4, 4, 4)))
    def half(x, sigma, t): return .5*x/(sigma**2+1)**.5
    ours = [*sample(plan, half, x, noise_fn)][-1].x_next
    assert_close(ours, y, rtol=1e-4, atol=1e-4)

def test_a_batch_is_its_pictures():
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    def bent(x, sigma, t): return torch.sin(x)/(1+sigma)
    for name in samplers:
        plan = make_plan(name, 5)
        both = last(plan, bent, plan.start(noise), (3, 4))
        alone = [last(plan, bent, plan.start(noise[i:i+1]), (3+i,)) for i in (0, 1)]
        assert_close(both, torch.cat(alone))

# ---------------------------------------------------------------- what is trained, by its values

def test_noise_loss():
    from sdlearn.denoiser import as_noise, noise_loss, velocity
    from sdlearn.schedule import add_noise, scale_input
    x0, eps, sigma = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([.1, 1., 9.])
    x_in = scale_input(add_noise(x0, eps, sigma), sigma)
    assert_close(as_noise(velocity(x0, eps, sigma), x_in, sigma, 'v_prediction'), eps, rtol=1e-4, atol=1e-4)
    seen = []
    def zero(x_in, sigma, cond): return seen.append((x_in, cond)) or 0*x_in
    per_picture = eps.square().mean((1, 2, 3))
    assert_close(noise_loss(zero, x0, 'words', sigma, eps), per_picture.mean())
    assert_close(seen[0][0], x_in)
    assert seen[0][1]=='words'
    weight = torch.tensor([0., 3., 0.])
    assert_close(noise_loss(zero, x0, None, sigma, eps, weight=weight), per_picture[1])
    v = velocity(x0, eps, sigma).square().mean()
    assert_close(noise_loss(zero, x0, None, sigma, eps, kind='v_prediction'), v)

def test_the_recipes_losses():
    from sdlearn.idea.autoencoder import kl
    from sdlearn.pocket.codec import fading, picture_loss, worst
    from sdlearn.pocket.recipe import snr_weight
    flat = torch.zeros(1, 3, 16, 16)
    chess = .1*((torch.arange(16)[:, None]+torch.arange(16))%2*2-1).expand(1, 3, 16, 16)
    # the edges are right, the colour is not; then the other way round; the worst hundredth is as bad as all
    assert_close(picture_loss(flat+.1, flat).item(), .1+4*.01+0+4*.01+.3*.1)
    assert_close(picture_loss(chess, flat).item(), .1+4*.01+.2+0+.3*.1)
    speck = flat.clone()
    speck[:, 0, 3, 4] = 3                                              # one of 256 pixels; two are a hundredth
    assert worst(speck, flat)==.5 and worst(flat, speck)==.5
    assert kl(torch.zeros(1), torch.zeros(1))==0 and kl(torch.ones(1), torch.zeros(1))==.5
    assert_close(snr_weight(torch.tensor([.1, .447214, 10.])), torch.tensor([.05, 1., 1.]), rtol=1e-4, atol=1e-4)
    assert [fading(i, 40) for i in (0, 5, 10, 39)]==[1, .5, 0, 0]

class Plain(torch.nn.Module):
    "Stands for an autoencoder that knows nothing: mean and log variance are given, the picture is the latents' mean"
    def __init__(self, mean, logvar):
        super().__init__()
        both = torch.cat([torch.full((1, 4, 1, 1), mean), torch.full((1, 4, 1, 1), logvar)], 1)
        self.encoder = lambda x: both.expand(len(x), 8, x.shape[2]//8, x.shape[3]//8)
        self.quant_conv = self.post_quant_conv = torch.nn.Identity()
        self.decoder = self
    def floors(self, z): yield z.mean(1, keepdim=True).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    def picture(self, x): return x

def test_the_autoencoders_loss():
    from sdlearn.pocket.codec import VAELoss, picture_loss
    x, noise = torch.full((2, 3, 16, 16), .5), torch.ones(2, 4, 2, 2)
    def loss(mean, logvar, kl_weight, fade):
        net = VAELoss(Plain(mean, logvar), kl_weight)
        torch.nn.init.constant_(net.color.weight, .25)                 # the helper says the latents' mean
        torch.nn.init.zeros_(net.color.bias)
        return net(x, noise, torch.tensor(fade)).item()
    z = 1+.5                                                           # mean 1, std .5, noise 1
    logvar = 2*math.log(.5)
    rec = picture_loss(torch.full_like(x, z), x).item()
    prior = (1+.25-1-logvar)/2
    assert prior>0
    assert_close(loss(1., logvar, 0., 0.), rec)
    assert_close(loss(1., logvar, 2., 0.), rec+2*prior)                # added: spread and mean both cost
    assert_close(loss(1., logvar, 0., .5), rec+4*(z-.5)**2)            # the helper's colour against the patch's

def test_droplets_have_a_price():
    from sdlearn.pocket.codec import drawn, stands_out
    maps = torch.ones(1, 4, 8, 8)
    assert stands_out(maps)==0
    maps[0, 2, 5, 5] = 40                                              # all of the rest is 63
    assert stands_out(maps)==0                                        # 40 is 7.8 times the root mean square
    wide = torch.nn.functional.pad(maps, (0, 8, 0, 8), value=1.)       # among 255
    assert_close(stands_out(wide).item(), (40/((255+1600)/256)**.5-8)/4, atol=1e-4, rtol=0.)
    assert stands_out(wide)==stands_out(-wide) and stands_out(.01*wide)>0
    class Two: # floors
        def floors(self, z): yield from (z*wide, z*wide)
        def picture(self, x): return x[:, :3]
    y, droplets = drawn(Two(), 1.)
    assert torch.equal(y, wide[:, :3]) and droplets==2*stands_out(wide)

def test_which_pictures_a_batch_takes_follows_from_the_step(monkeypatch):
    from types import SimpleNamespace
    import numpy as np
    from sdlearn.pocket import pictures
    from sdlearn.train import batch_rng, step_of
    class Blocks(list): block = 10
    data = Blocks(range(35))
    assert [pictures.usable(i, 10, data) for i in range(10)]==[10, 10, 10, 20, 20, 20, 30, 30, 35, 35]
    assert pictures.usable(0, 10, range(35))==35                       # an array is all there
    assert [step_of(batch_rng(s, i, r)) for s, i, r in ((0, 0, 0), (0, 9, 3), (5, 9, 63))]==[0, 9, 9]
    def of(rank, n): return lambda: SimpleNamespace(num_processes=n, process_index=rank)
    found = []
    for rank in range(3):
        monkeypatch.setattr(pictures, 'processes', of(rank, 3))
        found.append(set(pictures.picks(batch_rng(0, 0, rank), 12, 200).tolist()))
    assert found==[{0, 3, 6, 9}, {1, 4, 7, 10}, {2, 5, 8, 11}]
    ends = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, 3)
    assert pictures.batch_of(ends, [1, 0])[:, 0, 0, 0].tolist()==[1, -1]

def test_blocks_of_pictures_are_whole_and_of_one_kind(tmp_path, monkeypatch):
    import numpy as np
    from sdlearn.pocket import pictures
    from sdlearn.pocket.scenes import caption, draw, scene
    data = pictures.Pictures(tmp_path/'few', 5, block=2, side=16)
    got = data[[4, 0]]
    assert sorted(p.name for p in (tmp_path/'few').iterdir())==['00000.json', '00000.npy', '00002.json', '00002.npy']
    want = [np.asarray(draw(scene(i)).resize((16, 16), 1)) for i in (4, 0)]     # 1: Lanczos
    assert (got==np.stack(want)).all() and len(data.read(2))==1
    assert data.captions()==[caption(scene(i)) for i in range(5)]
    assert not data.workers and len(pictures.Pictures(tmp_path/'few', 5, block=2, side=16))==5
    with pytest.raises(ValueError, match='count was 5 and is 6'): pictures.Pictures(tmp_path/'few', 6, block=2, side=16)[[0]]
    from sdlearn.pocket.codec import vae_batch
    from sdlearn.train import fingerprint                              # of a set as of an array, without drawing it
    of = [fingerprint(vae_batch(pictures.Pictures(tmp_path/'few', n, block=2, side=16), 10)) for n in (5, 5, 6)]
    assert of[0]==of[1]!=of[2]
    monkeypatch.setattr(pictures, 'version', -1)                       # another atlas
    with pytest.raises(ValueError, match='drawn'): pictures.Pictures(tmp_path/'few', 5, block=2, side=16)[[0]]

def test_the_decoder_gets_latents_of_both_kinds():
    from sdlearn.pocket.codec import latents_to_draw
    from sdlearn.schedule import sigma_at
    z, words = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(5)), torch.arange(64.).view(64, 1, 1).expand(64, 3, 2)
    asked = []
    class Says(Stub):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer
        def forward(self, x_in, t, words):
            asked.append((x_in, t, words))
            return self.answer(x_in, sigma_at(t).view(-1, 1, 1, 1))
    def given(answer, **kw): return latents_to_draw(Says(answer), z, words, torch.Generator().manual_seed(0), **kw)
    truth = z[32:]
    knows = given(lambda x_in, s: (x_in*(s**2+1)**.5-truth)/s)         # the noise in it, if alpha is alpha
    assert_close(knows[32:], truth, rtol=1e-3, atol=1e-3)
    assert .03<(knows[:32]-z[:32]).std()<.05                           # the encoder's half: a little noise
    x_in, t, said = asked[0]
    assert torch.equal(said, words[32:])
    for seed in range(40): latents_to_draw(Says(lambda x_in, s: x_in), z, words, torch.Generator().manual_seed(seed))
    t = torch.cat([a[1] for a in asked])
    assert 20<=t.min()<24 and 445<t.max()<450
    asked.clear()
    deaf = given(lambda x_in, s: 0*x_in, noise=0.)                     # "there is none": it all stays
    s = sigma_at(asked[0][1])
    assert torch.equal(deaf[:32], z[:32])
    assert_close((deaf[32:]-truth).square().flatten(1).mean(1).sqrt(), s, rtol=.7, atol=0)     # 16 numbers each
    lost = given(lambda x_in, s: 100+0*x_in, noise=0.)
    assert torch.equal(lost[:32], z[:32]) and (lost[32:]<truth).all()  # x0 is x - sigma*eps

class Bright(torch.nn.Module):
    "Stands for the critic: bright is real"
    def __init__(self, k=2.):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(k))
    def forward(self, x): return self.k*x.mean((1, 2, 3))

def test_decoder_and_critic_pull_the_right_ways():
    from sdlearn.pocket.codec import adaptive_weight, hinge, picture_loss, two_losses
    from sdlearn.train import batch_rng
    one = torch.ones(2, 1)
    assert hinge(one, -one)==hinge(3*one, -3*one)==0 and hinge(-one, one)==4 and hinge(one, 0*one)==1==hinge(0*one, -one)
    last = torch.nn.Parameter(torch.tensor([3., 4.]))
    assert_close(adaptive_weight(2*last.square().sum(), 5*last.sum(), last), torch.tensor(20/50**.5))
    assert adaptive_weight(last.sum(), 0*last.sum(), last)==50
    class Half(torch.nn.Module): # z times one number
        def __init__(self):
            super().__init__()
            self.decoder = torch.nn.Module()
            self.decoder.conv_out = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.constant_(self.decoder.conv_out.weight, .5)
        def forward(self, z): return z*self.decoder.conv_out.weight, 5.    # and droplets
    x, half, critic = torch.ones(2, 3, 16, 16), Half(), Bright()
    decoder_loss, critic_loss = two_losses(half, critic, lambda g: (x, x), 20)
    rec, pull = picture_loss(.5*x, x)+.02*5, 1+4+4+.3                        # of the loss on the number
    assert_close(decoder_loss(batch_rng(0, 6)), rec)                   # 35% of 20 steps is 7
    loss = decoder_loss(batch_rng(0, 7))
    assert_close(loss, rec+.3*pull/2*(-2*.5))
    loss.backward()
    assert_close(half.decoder.conv_out.weight.grad.item(), -pull-.3*pull)
    assert critic.k.grad is None and critic.k.requires_grad
    critic_loss(None).backward()                                       # real says 2 (enough), decoded says 1
    assert critic.k.grad==.5 and critic_loss(None)==2                  # a smaller k would be better

def test_the_critic_learns_in_turns():
    from sdlearn.pocket.codec import in_turns
    half, critic = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    order = []
    def loss(name, net):
        def ask(g):
            order.append(name)
            return net(torch.ones(1, 1)).square().sum()
        return ask
    pairs = [*in_turns(half, critic, (loss('d', half), loss('c', critic)), 8, {}, dict(lr=1e-3))]
    assert ''.join(order)=='dd'+'dc'*6                                 # from a quarter on
    assert [p[1] and p[1].i for p in pairs]==[None, None, 0, 1, 2, 3, 4, 5]

def small_pair():
    from sdlearn.idea.contrast import ImageEncoder
    from sdlearn.pocket.recipe import Pair
    from sdlearn.text import TextEncoder
    torch.manual_seed(0)
    return Pair(TextEncoder(tiny_text), ImageEncoder(8, (16,), 8))

def test_words_and_pictures_are_paired():
    import numpy as np
    from sdlearn.idea.contrast import contrastive_loss
    from sdlearn.pocket.recipe import only_images, pair_loss, silence, softener
    from sdlearn.pocket.pictures import batch_of, picks
    from sdlearn.train import batch_rng
    pair, g = small_pair(), torch.Generator().manual_seed(1)
    data = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    ids = torch.randint(300, 400, (8, 6), generator=g)
    ids[:, 4:] = 49407                                                 # the end, and padding behind it
    idx = picks(batch_rng(0, 0), 8, 5)
    words = pair.text_projection(pair.text(ids)[:, 4])
    words = words/words.norm(dim=-1, keepdim=True)
    assert_close(pair.words(ids), words)                               # the first end counts
    loss = pair_loss(data, ids, 5)(pair, batch_rng(0, 0))
    assert_close(loss, contrastive_loss(pair.image(batch_of(data, idx)), words[idx], 20.))
    silence(pair, ids)
    table = pair.text.get_input_embeddings().weight
    assert table.any(1).nonzero().flatten().tolist()==ids.unique().tolist()
    only_images(pair)
    free = {k.split('.')[0] for k, p in pair.named_parameters() if p.requires_grad}
    assert free=={'image', 'text_projection', 'scale'}
    class Back(torch.nn.Module): # a VAE whose decoder gives the latents back
        config = type('config', (), dict(scaling_factor=1.))
        post_quant_conv = torch.nn.Conv2d(4, 4, 1)
        decoder = torch.nn.Conv2d(4, 3, 1, bias=False)
    torch.nn.init.dirac_(Back.post_quant_conv.weight)
    torch.nn.init.zeros_(Back.post_quant_conv.bias)
    torch.nn.init.dirac_(Back.decoder.weight)
    z, x = torch.linspace(-.9, .9, 8).view(8, 1, 1, 1).expand(8, 4, 8, 8), torch.full((4, 3, 8, 8), 7.)
    y = softener(Back(), z, 0.)(x, torch.tensor([6, 1, 2, 3]), batch_rng(0, 0))
    assert_close(y[:2], z[[6, 1], :3]) and torch.equal(y[2:], x[2:])   # the first half, and whose it is
    noisy = softener(Back(), 0*z, .1)(x.expand(4, 3, 8, 8), torch.arange(4), batch_rng(0, 0))[:2]
    assert .09<noisy.std()<.11

def test_recipes_are_refused_in_words(tmp_path):
    from dataclasses import replace
    from sdlearn.pocket.recipe import check_place, check_recipe, claim, tiny
    check_recipe(tiny)
    for odd, said in ((dict(unet_steps=0), 'unet_steps as a whole number of 1 or more, got 0'), (dict(image_bs=1), 'image_bs as a whole number of 2 or more'),
                      (dict(processes=-2), 'processes as a whole number of 0 or more')):
        with pytest.raises(ValueError, match=said): check_recipe(replace(tiny, **odd))
    check_recipe(replace(tiny, vae_steps=0, clip_steps=0, unet_steps=0), 'a folder')
    with pytest.raises(ValueError, match='only as they were'): check_recipe(replace(tiny, unet_steps=0), 'a folder')
    nets = [torch.nn.Linear(1, 1)]
    claim(tmp_path/'run', tiny, nets)
    claim(tmp_path/'run', replace(tiny, processes=3, save_every=1., compiled=0), nets)
    with pytest.raises(ValueError, match='clip_bs was 12 and is 13'): claim(tmp_path/'run', replace(tiny, clip_bs=13), nets)
    with pytest.raises(ValueError, match='start was'): claim(tmp_path/'run', tiny, [torch.nn.Linear(1, 1)])
    check_place(tmp_path/'new')
    with pytest.raises(ValueError, match='something else'): check_place(tmp_path)

def test_a_recipe_replaces_only_what_a_recipe_made(tmp_path):
    from sdlearn.pocket.recipe import new_networks, save_checkpoint
    vae, pair, unet = new_networks()
    for _ in range(2): save_checkpoint(tmp_path/'mine', vae, pair, unet)
    shutil.copytree(tmp_path/'mine', tmp_path/'yours')
    (tmp_path/'yours'/'recipe.txt').unlink()                # as one that was trained further and saved
    with pytest.raises(ValueError, match='something else'): save_checkpoint(tmp_path/'yours', vae, pair, unet)

def test_a_handout_writes_over_nothing(tmp_path):
    def hand(folder): return subprocess.run([sys.executable, root/'.ci'/'exercises', '--handout', folder], capture_output=True, encoding='utf8')
    (tmp_path/'class').mkdir()
    (tmp_path/'class'/'20_score.ipynb').write_text('solved', encoding='utf8')
    for odd, said in ((tmp_path/'class', 'has 20_score.ipynb'), ('', 'a folder'), (tmp_path/'class'/'20_score.ipynb', 'a folder')):
        done = hand(odd)
        assert done.returncode and said in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert (tmp_path/'class'/'20_score.ipynb').read_text(encoding='utf8')=='solved'
    assert hand(tmp_path/'new').returncode==0 and (tmp_path/'new'/'20_score.ipynb').exists()

def test_contrast():
    from sdlearn.idea.contrast import contrastive_loss, retrieval
    eye = torch.eye(4)
    assert contrastive_loss(eye, eye, 100.)<1e-6<contrastive_loss(eye, eye.roll(1, 0), 100.)
    assert_close(contrastive_loss(0*eye, eye), torch.tensor(4.).log())
    assert retrieval(eye, eye)==(1, 1) and retrieval(eye, eye.roll(1, 0))==(0, 0)

def test_guidance_leans_the_right_way():
    from sdlearn.guidance import cfg
    uncond, text = torch.tensor([1.]), torch.tensor([3.])
    assert [cfg(uncond, text, g).item() for g in (0, 1, 7.5)]==[1, 3, 16]

def line_loss(net, g): # a straight line from noisy points
    x = torch.rand(8, 1, generator=g)
    return (net(x)-3*x).square().mean()

def test_training_goes_on_where_it_stopped(tmp_path):
    from sdlearn.train import fit, load_state, train_steps, trained
    def net():
        torch.manual_seed(0)
        return torch.nn.Linear(1, 1)
    whole, parts, how = net(), net(), dict(lr=1e-2, warmup=1, progress=False)
    losses = fit(whole, line_loss, 8, **how)
    fit(parts, line_loss, 3, tmp_path/'s.pt', **how)
    assert fit(net(), line_loss, 8, tmp_path/'s.pt', **how)==losses
    again = net()
    fit(again, line_loss, 8, tmp_path/'s.pt', **how)                   # finished: only read
    for a, b in zip(again.parameters(), whole.parameters()): assert torch.equal(a, b)
    with pytest.raises(ValueError, match='at least 8 steps'): fit(net(), line_loss, 4, tmp_path/'s.pt', **how)
    with pytest.raises(ValueError, match='seed was 0 and is 1'): fit(net(), line_loss, 9, tmp_path/'s.pt', seed=1, **how)
    def other(net, g): return 2*line_loss(net, g)
    with pytest.raises(ValueError, match='another'): fit(net(), other, 9, tmp_path/'s.pt', **how)
    assert load_state(tmp_path/'s.pt')['step']==8
    hand = net()
    for step in train_steps(lambda g: line_loss(hand, g), trained(hand), 8, lr=1e-2, warmup=1): pass
    assert_close([*step.averaged.values()], [p.detach() for p in whole.parameters()], rtol=0, atol=0)

def test_a_training_goes_on_from_its_own_start_alone(tmp_path):
    from sdlearn.train import fit
    def net(seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(1, 1)
    def go_on(net): fit(net, line_loss, 4, tmp_path/'s.pt', progress=False)
    mine = net(0)
    for m in (mine, net(0), mine): go_on(m)         # at first, as another program does, once more
    other = net(1)
    before = other.weight.clone()
    with pytest.raises(ValueError, match='started from others'): go_on(other)
    assert torch.equal(other.weight, before)

def test_a_training_stopped_by_hand_keeps_its_last_step(tmp_path, monkeypatch):
    from sdlearn import train
    from sdlearn.train import fingerprint, fit, load_state
    torch.manual_seed(0)
    net, calls, how = torch.nn.Linear(1, 1), [], dict(lr=1e-2, progress=False)
    whole = copy.deepcopy(net)
    losses = fit(whole, line_loss, 5, **how)
    def stopped(net, g):
        calls.append(1)
        if len(calls)==3:
            line_loss(net, g).backward()
            raise KeyboardInterrupt
        return line_loss(net, g)
    monkeypatch.setattr(train, 'fingerprint', lambda x: 'one' if callable(x) else fingerprint(x))
    with pytest.raises(KeyboardInterrupt): fit(net, stopped, 5, tmp_path/'s.pt', **how)
    assert load_state(tmp_path/'s.pt')['step']==2
    assert fit(net, stopped, 5, tmp_path/'s.pt', **how)==losses and torch.equal(net.weight, whole.weight)

def test_training_stops_before_the_first_nan(tmp_path):
    from sdlearn.train import batch_rng, fit, load_state
    def bad(net, g): # a finite loss without a slope at step 2
        zero = g.initial_seed()==batch_rng(0, 2).initial_seed()
        return line_loss(net, g)+(net.weight.sum()*(0 if zero else 1)).abs().sqrt()
    with pytest.raises(FloatingPointError, match='at step 2'):
        fit(torch.nn.Linear(1, 1), bad, 5, tmp_path/'s.pt', save_every=0, progress=False)
    kept = load_state(tmp_path/'s.pt')
    assert kept['step']==2 and all(v.isfinite().all() for v in (*kept['params'].values(), *kept['averaged'].values()))

two_processes = """
import sys, torch
from sdlearn.train import batch_rng, ema_decay, fit, lr_factor

def net():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)

def loss(net, g): return (net(torch.randn(4, 3, generator=g))-1).square().mean()

def bad(net, g): # only the second process meets it
    return loss(net, g)*(float('nan') if g.initial_seed()==batch_rng(0, 2, 1).initial_seed() else 1)

def main():
    from accelerate import PartialState
    trained = net()
    fit(trained, loss, 6, sys.argv[1]+'/state.pt', lr=1e-2, warmup=1, progress=False)
    torch.save(trained.state_dict(), f'{sys.argv[1]}/{PartialState().process_index}.pt')
    try: fit(net(), bad, 5, lr=1e-2, progress=False)
    except FloatingPointError: return
    raise AssertionError('both processes should have stopped')

if __name__=='__main__':
    import torch._dynamo     # optimisers ask for it: once, before there are three processes
    from accelerate import debug_launcher
    debug_launcher(main, num_processes=2)
    a, b = (torch.load(f'{sys.argv[1]}/{i}.pt') for i in (0, 1))
    hand = net()
    opt = torch.optim.AdamW(hand.parameters(), lr=1e-2, betas=(.9, .99), weight_decay=.01)
    mean = {k: p.detach().clone() for k, p in hand.named_parameters()}
    for i in range(6):
        opt.param_groups[0]['lr'] = 1e-2*lr_factor(i, 6, 1)
        (sum(loss(hand, batch_rng(0, i, rank)) for rank in (0, 1))/2).backward()
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        for k, p in hand.named_parameters(): mean[k].lerp_(p.detach(), 1-ema_decay(i, .999))
    for k in mean:
        torch.testing.assert_close(a[k], mean[k])
        assert torch.equal(a[k], b[k])
"""

two_halves = """
import sys, numpy as np, torch
from sdlearn.idea.contrast import ImageEncoder, contrastive_loss
from sdlearn.pocket.pictures import batch_of
from sdlearn.pocket.recipe import Pair, pair_loss
from sdlearn.text import TextEncoder
from sdlearn.train import batch_rng, fit, lr_factor

def pair():
    torch.manual_seed(0)
    return Pair(TextEncoder(dict(vocab_size=49408, hidden_size=12, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=77)), ImageEncoder(8, (16,), 8))

data = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
ids = torch.randint(300, 400, (16, 5), generator=torch.Generator().manual_seed(0))
ids[:, 4] = 49407

def main():
    from accelerate import PartialState
    net = pair()
    losses = fit(net, pair_loss(data, ids, 3), 4, sys.argv[1]+'/clip.pt', lr=1e-2, warmup=1, ema=0., progress=False)
    here = PartialState()
    torch.save((here.num_processes, losses, net.state_dict()), f'{sys.argv[1]}/{here.process_index}.pt')

if __name__=='__main__':
    import torch._dynamo     # optimisers ask for it: once, before there are three processes
    from accelerate import debug_launcher
    debug_launcher(main, num_processes=2)
    (n, a_losses, a), (m, b_losses, b) = (torch.load(f'{sys.argv[1]}/{i}.pt') for i in (0, 1))
    assert n==m==2
    hand = pair()
    opt = torch.optim.AdamW(hand.parameters(), lr=1e-2, betas=(.9, .99), weight_decay=.01)
    for i in range(4): # both shares as one batch: even pictures, then odd ones
        idx = torch.cat([torch.randint(8, (3,), generator=batch_rng(0, i, r))*2+r for r in (0, 1)])
        loss = contrastive_loss(hand.image(batch_of(data, idx)), hand.words(ids[idx]), hand.scale.exp())
        assert abs(loss.item()-a_losses[i])<1e-4 and abs(loss.item()-b_losses[i])<1e-4, (i, loss, a_losses, b_losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    for k, v in hand.state_dict().items():
        assert torch.equal(a[k], b[k])
        if 'k_proj.bias' in k: continue # attention does not depend on it: Adam enlarges rounding errors
        torch.testing.assert_close(a[k], v, rtol=1e-3, atol=1e-4)
"""

@pytest.mark.skipif(sys.platform!='linux', reason='the launcher forks')
@pytest.mark.parametrize('program', [two_processes, two_halves], ids=['a line', 'the stage of words and pictures'])
def test_two_processes_train_one_network(tmp_path, program):
    (tmp_path/'two.py').write_text(program)
    done = subprocess.run([sys.executable, 'two.py', str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ|dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1'))
    assert done.returncode==0, done.stderr[-3000:]

# ---------------------------------------------------------------- what only we define: no library would notice

def test_a_words_map_is_where_its_attention_is():
    from sdlearn.attention import word_map
    maps = {'wide': torch.zeros(2, 3, 8*16, 77), 'small': torch.zeros(2, 3, 4*8, 77)}  # a picture twice as wide as high
    for k, (h, w) in dict(wide=(8, 16), small=(4, 8)).items():
        maps[k][1, :, (h//4)*w+3*w//4, 5] = 1.                       # upper half, right: word 5, second picture
    heat = word_map(maps, [5], size=(64, 128), row=1)
    y, x = divmod(heat.argmax().item(), 128)
    assert heat.shape==(64, 128) and heat.max()==1 and heat.min()==0
    assert 10<y<26 and 90<x<110, (y, x)
    assert word_map(maps, [4], size=(64, 128), row=1).max()==0==word_map(maps, [5], size=(64, 128), row=0).max()

def test_attention_is_seen_as_it_is():
    from sdlearn.attention import attention_maps, attention_patterns
    from sdlearn.text import TextEncoder
    from sdlearn.unet import UNet
    text = randomized(TextEncoder(dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                       num_attention_heads=2, max_position_embeddings=6)))
    ids = torch.randint(0, 20, (2, 6))
    patterns = attention_patterns(text, ids)
    assert patterns.shape==(2, 2, 2, 6, 6) and patterns.triu(1).abs().max()==0
    assert_close(patterns.sum(-1), torch.ones(2, 2, 2, 6))
    unet = randomized(UNet(dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
                                attention_head_dim=2, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
                                up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))))
    maps = attention_maps(unet, torch.randn(1, 4, 8, 8), 500, torch.randn(1, 6, 8))
    assert sorted({m.shape for m in maps.values()})==[(1, 2, 16, 6), (1, 2, 64, 6)]
    for m in maps.values(): assert_close(m.sum(-1), torch.ones(m.shape[:3]))

def test_clip_loss_shows_the_encoder_what_it_was_trained_on():
    from sdlearn.guidance import clip_loss
    seen = []
    def encoder(x): return seen.append(x) or x.flatten(1)[:, :4]
    grey = torch.tensor([0., .5, 1., 1.]).view(1, 1, 2, 2).expand(-1, 3, -1, -1)
    loss = clip_loss(grey, encoder, torch.tensor([[-1., 0., 1., 1.]]))
    assert_close(seen[0][:, 2].flatten(), torch.tensor([-1., 0., 1., 1.]))
    assert_close(loss, torch.tensor(0.))

def test_losses_push_downhill_when_they_should():
    from sdlearn.denoiser import Step
    from sdlearn.guidance import LossGuide, loss_guided
    x = torch.ones(1, 4, 2, 2)
    def bright(images): return images.mean()            # of 12 numbers, each x/2+.5: a slope of 1/24
    def three(z): return z[:, :3]
    def pushes(**how):
        guide = LossGuide(bright, three, 2., **how)
        steps = [Step(i, 0., sigma, x, 0*x, x, x, sigma/2) for i, sigma in enumerate((8., 4., 2., 1.))]
        for step in steps: guide(step)
        assert len(guide.losses)==sum(bool((step.x_next!=x).any()) for step in steps)
        return [round(12*(1-step.x_next[0, 0, 0, 0].item()), 3) for step in steps]
    assert pushes()==[64, 16, 4, 1]                     # scale*sigma^2/24, times 12
    assert pushes(every=2)==[64, 0, 4, 0]
    assert pushes(interval=(2., 4.))==[0, 16, 4, 0]
    def eps_fn(x, sigma, t): return .1*x
    for through, slope in ((False, 1/24), (True, .6/24)):       # x0 = x-.4x
        said = loss_guided(eps_fn, bright, three, 2., through)(x, 4., 0)
        assert_close(said[:, :3], torch.full((1, 3, 2, 2), .1+2*4*slope))
        assert_close(said[:, 3], torch.full((1, 2, 2), .1))

def test_masks_are_black_or_white_and_the_start_is_counted_as_diffusers_does():
    from PIL import Image
    from sdlearn.pipeline import _masks, start_step
    grey = Image.new('L', (16, 16), 100)
    grey.paste(200, (0, 0, 8, 16))
    masks = _masks(grey, [Image.new('RGB', (16, 16))]*2)
    assert len(masks)==2 and masks[0].getcolors()==[(128, 0), (128, 255)] and masks[1].getpixel((7, 3))==255
    for n, strength, first in ((10, .25, 8), (7, .5, 4), (30, .6, 12), (4, .24, 4), (12, 1., 0), (12, 0., 12)):
        assert start_step(n, strength)==first, (n, strength)

def test_step_panel_has_the_latents_on_the_left():
    from sdlearn.denoiser import make_step
    from sdlearn.load import load_sd
    from sdlearn.pipeline import step_panel
    from sdlearn.schedule import scale_input
    from sdlearn.vae import latents_to_pil
    sd = load_sd(networks='own')
    x, eps = 5*torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    panel = step_panel(sd, make_step(0, 800., 5., x, eps, x, 4.))
    left, right = (latents_to_pil(z, sd.vae)[0] for z in (scale_input(x, 5.), x-5*eps))
    def off(a, b): return torch.tensor([*a.tobytes()]).sub(torch.tensor([*b.tobytes()])).abs().max()
    assert off(panel.crop((0, 0, 128, 128)), left)<=1 and off(panel.crop((128, 0, 256, 128)), right)<=1

def test_words_are_cut_at_every_contraction():
    from sdlearn.tokenizer import split_words
    for short in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
        assert split_words('we'+short+' go')==['we', short, 'go']
        assert split_words(short+'x')==[short, 'x']
    assert split_words("a1b2!? 'x")==['a', '1', 'b', '2', '!?', "'", 'x']

@pytest.mark.parametrize('size, length', [(2, 77), (49407, 77), (49408, 10**30), (49408, 76)])
def test_a_hollow_tokenizer_is_refused(size, length):
    from sdlearn.tokenizer import check_tokenizer
    class Hollow:
        model_max_length = length
        def __len__(self): return size
    with pytest.raises(ValueError, match='49408 tokens'): check_tokenizer(Hollow())

def test_pictures_are_taken_as_people_see_them():
    import io
    import numpy as np
    from PIL import Image
    from sdlearn.core import as_rgb, images_to_tensor, whole
    from sdlearn.pipeline import _holes, as_mask
    lying, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (8, 16)).save(lying, 'JPEG', exif=exif)
    assert as_rgb(Image.open(lying)).size==(16, 8)
    clear = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    for im in (clear, clear.convert('LA')): assert images_to_tensor(im).min()==1
    for a in (np.array([[0, 32768, 65535]], np.uint16), np.array([[0, .5, 1.]], np.float32)):
        assert [as_rgb(Image.fromarray(a)).getpixel((i, 0))[0] for i in range(3)]==[0, 128, 255]
    hole = np.zeros((16, 16), np.uint8)
    hole[3, 5] = 255                                        # one pixel
    erased = Image.new('RGB', (16, 16), 'red')
    erased.putalpha(Image.fromarray(255-hole))
    for kind in (Image.fromarray(hole), Image.fromarray(hole//255), Image.fromarray(hole).convert('1'), erased,
                 Image.fromarray(hole.astype(np.uint16)*257)):
        assert np.array_equal(np.asarray(as_mask(kind)), hole), kind.mode
    assert _holes([as_mask(erased)], torch.zeros(1, 4, 2, 2)).flatten().tolist()==[1, 0, 0, 0]
    assert [whole(x) for x in (3, np.int64(3), torch.tensor(3), True, 3., '3')]==[3, 3, 3, None, None, None]

# ---------------------------------------------------------------- the seam, the plans, the doors: on stubs

class Stub(torch.nn.Module):
    "A network that answers with a formula of what it is given, and keeps what it was asked"
    def __init__(self):
        super().__init__()
        from types import SimpleNamespace
        self.config = SimpleNamespace(in_channels=4, cross_attention_dim=2, sample_size=2)
        self.one, self.asked = torch.nn.Parameter(torch.zeros(1)), []
    def forward(self, x_in, t, words):
        self.asked.append((x_in, t, words))
        return .1*x_in+words[:, :1, :1, None]

def bundle(**kw):
    from types import SimpleNamespace
    return SimpleNamespace(unet=Stub(), guidance_scale=3., **dict(schedule=SD_V1)|kw)

def test_noise_predictor_asks_what_it_should():
    from sdlearn.denoiser import noise_predictor
    words = torch.tensor([1., 1., 5., 5.]).view(4, 1, 1).expand(4, 77, 2)   # two pictures: without and with the prompt
    x, sigma = torch.randn(2, 4, 2, 2), 3.
    x_in = x/10**.5
    said = {g: noise_predictor(bundle(), words, g)(x, sigma, 500) for g in (None, 0, 1, 7.)}
    for g, expected in {None: 1+3*4, 0: 1, 1: 5, 7.: 1+7*4}.items():
        assert_close(said[g], .1*x_in+expected)
    sd = bundle()
    noise_predictor(sd, words, 7.)(x, sigma, 500)
    seen, t, _ = sd.unet.asked[-1]
    assert_close(seen, torch.cat([x_in]*2))
    assert t==500
    inside, outside = (noise_predictor(bundle(), words, 7., i)(x, sigma, 500) for i in ((2., 4.), (4., 5.)))
    assert_close(inside, said[7.])
    assert_close(outside, said[1])
    v = noise_predictor(bundle(schedule=Schedule(prediction_type='v_prediction')), words, 1.)(x, sigma, 500)
    assert_close(v, (.1*x_in+5+sigma*x_in)/10**.5)                          # eps = (v + sigma x_in)/sqrt(sigma^2+1)
    half = noise_predictor(bundle(), words.half(), 1.)(x, sigma, 500)
    assert half.dtype==x.dtype

schedulers = dict(EulerDiscrete={}, HeunDiscrete={}, DDIM={}, PNDM={}, LMSDiscrete={}, UniPCMultistep={}, LCM={},
                  DPMSolverMultistep={}, KDPM2Discrete={}, EulerAncestralDiscrete={}, DDPM={}, SASolver={})

@pytest.mark.parametrize('v', [False, True])
@pytest.mark.parametrize('name', schedulers)
def test_a_scheduler_object_draws_what_its_own_loop_draws(name, v):
    import diffusers, inspect
    from sdlearn.denoiser import as_noise
    if v and name=='PNDM': pytest.skip('diffusers adds up raw v of several sigmas there; ours adds up noise')
    kind = 'v_prediction' if v else 'epsilon'
    config = dict(beta_start=.001, beta_end=.01, beta_schedule='scaled_linear', clip_sample=False, steps_offset=1,
                  skip_prk_steps=True, prediction_type=kind)
    theirs, schedule = getattr(diffusers, name+'Scheduler').from_config(config), read_schedule(config)
    x0, g = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.Generator()
    untouched = theirs.num_inference_steps
    def network(x_in, t): return torch.sin(2*x_in)+.3*math.cos(t/100)       # says noise, or v
    for k in (0, 2):
        g.manual_seed(7)
        s = theirs.from_config(theirs.config)
        s.set_timesteps(5)
        ts, z = s.timesteps[k*s.order:], torch.randn(x0.shape, generator=g)
        if k and hasattr(s, 'set_begin_index'): s.set_begin_index(k*s.order)
        y = s.add_noise(x0, z, ts[:1]) if k else z*s.init_noise_sigma
        more = {q: u for q, u in dict(generator=g, eta=0.).items() if q in inspect.signature(s.step).parameters}
        for t in ts: y = s.step(network(s.scale_model_input(y, t), float(t)), t, y, **more).prev_sample
        plan, noise_fn = make_plan(theirs, 5, schedule).after(k), noise_from([torch.Generator().manual_seed(7)])
        def eps_fn(x, sigma, t):
            x_in = x/(sigma**2+1)**.5
            return as_noise(network(x_in, t), x_in, sigma, kind)
        x = plan.start(noise_fn(x0), x0 if k else None)
        steps = list(sample(plan, eps_fn, x, noise_fn))
        assert len(steps)==plan.calls==len(ts)
        assert_close(steps[-1].x_next, y, rtol=2e-4, atol=2e-4)
        assert theirs.num_inference_steps==untouched

def test_doors_hand_everything_on():
    "txt2img, img2img and inpaint on the real bundle, with the loop watched"
    import dataclasses
    from PIL import Image
    from sdlearn import img2img, inpaint, load_sd, txt2img
    sd = load_sd(networks='own')
    other = dataclasses.replace(sd, schedule=Schedule(beta_end=.02))
    im, hole = Image.new('RGB', (128, 128), 'red'), Image.new('L', (128, 128))
    hole.paste(255, (0, 0, 128, 64))
    def nothing(x, sigma, t): return 0*x
    how = dict(num_inference_steps=4, sampler='euler', progress=False)
    for door, more in ((txt2img, {}), (img2img, dict(image=im, strength=.5)), (inpaint, dict(image=im, mask=hole))):
        steps = []
        door(other, eps_fn=nothing, seed=[5], on_step=steps.append, **more, **how)
        plan = make_plan('euler', 4, other.schedule)
        expected = plan.after(2) if door is img2img else plan
        assert [s.sigma for s in steps]==expected.sigmas[:-1] and len(steps)==expected.calls
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    steps = []
    txt2img(sd, eps_fn=nothing, seed=5, on_step=steps.append, **how)
    assert_close(steps[0].x, make_plan('euler', 4).start(start))
    steps = []
    img2img(sd, eps_fn=nothing, image=im, seed=5, strength=.5, on_step=steps.append, **how)
    from sdlearn.vae import encode
    g = torch.Generator().manual_seed(5)
    latents = encode(sd.vae, torch.tensor([1., -1, -1]).view(1, 3, 1, 1).expand(1, 3, 128, 128), [g])
    noise = torch.randn(1, 4, 16, 16, generator=g)
    assert_close(steps[0].x, latents+make_plan('euler', 4).sigmas[2]*noise, rtol=1e-4, atol=1e-4)
    steps = []
    inpaint(sd, eps_fn=nothing, image=im, mask=hole, seed=5, on_step=steps.append, **how)
    kept, level = steps[1].x[..., 8:, :], steps[1].sigma                    # below the hole: the picture, with noise
    assert_close(kept, (latents+level*noise)[..., 8:, :], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steps[1].x[..., :8, :], (latents+level*noise)[..., :8, :], atol=.1)
    words = []
    class Watch(torch.nn.Module):
        config = sd.unet.config
        def forward(self, x_in, t, emb): return words.append(emb) or 0*x_in
    watched = dataclasses.replace(sd, unet=Watch())
    type(watched).device, type(watched).dtype                               # properties of the bundle
    from sdlearn.pipeline import encode_prompt
    both = encode_prompt(sd, ['a picture of a cat'], 'a picture of a fox')
    alone = [encode_prompt(sd, [p], p)[1] for p in ('a picture of a fox', 'a picture of a cat')]
    assert_close(both, torch.stack(alone))                                  # the negative half first

def test_training_puts_the_average_in_and_nothing_else_is_touched():
    from sdlearn.train import ema_decay, fit, lr_factor, train_steps, trained
    assert [ema_decay(i, .9) for i in (0, 8, 1000)]==[.1, .5, .9]
    assert [lr_factor(i, 100, 10) for i in (0, 9, 50)]==[.1, 1., 1.]
    assert math.isclose(lr_factor(50, 100, 10, True), .5) and lr_factor(100, 100, 10, True)<1e-12
    torch.manual_seed(3)
    a, b = (torch.nn.Linear(1, 1) for _ in 'ab')
    b.load_state_dict(a.state_dict())
    before, looked = torch.get_rng_state(), []
    def look(net, i): looked.append((i, net.weight.item()))
    def loss(net, g): return line_loss(net, g)*torch.rand(())              # torch's own numbers follow from the seed
    losses = fit(a, loss, 6, lr=.1, warmup=1, ema=.5, preview=look, preview_every=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    raw = []
    for step in train_steps(lambda g: loss(b, g), trained(b), 6, lr=.1, warmup=1, ema=.5):
        raw.append((step.loss, step.averaged['weight'].item(), b.weight.item()))
    assert losses==[r[0] for r in raw] and looked==[(3, raw[2][1]), (6, raw[5][1])]
    assert a.weight.item()==raw[5][1]!=raw[5][2]

def test_two_writers_are_kept_apart(tmp_path):
    from sdlearn.train import one_writer
    with one_writer(tmp_path/'s.pt'):
        with pytest.raises(ValueError, match='another program'):
            with one_writer(tmp_path/'s.pt'): pass
    with one_writer(tmp_path/'s.pt'): pass

def test_another_shape_is_refused_before_anything_is_overwritten(tmp_path):
    from sdlearn.train import fit
    def loss(net, g): return net(torch.rand(4, 2, generator=g)).square().mean()
    fit(torch.nn.Linear(2, 1), loss, 2, tmp_path/'s.pt', progress=False)
    wide = torch.nn.Linear(2, 3)
    before = wide.weight.clone()
    with pytest.raises(ValueError, match='names or shapes'): fit(wide, loss, 3, tmp_path/'s.pt', progress=False)
    assert torch.equal(wide.weight, before)

def test_fingerprints_change_with_code_and_data_and_not_otherwise():
    from sdlearn.train import fingerprint
    few = torch.arange(8.)
    def on(data, k=1.):
        def loss(g): return k*data.mean()
        return loss
    assert fingerprint(on(few))==fingerprint(on(few.clone()))
    found = {fingerprint(f) for f in (on(few), on(few+1), on(few[:7]), on(few, 2.), lambda g: few.sum())}
    assert len(found)==5
    spaces = [dict(few=few) for _ in range(3)]
    for space, k in zip(spaces, (1, 1, 2)): exec(f'def helper(x): return {k}*x\ndef loss(g): return helper(few)', space)
    a, b, c = (fingerprint(s['loss']) for s in spaces)
    assert a==b!=c

def test_plans_start_where_they_should():
    noise, latents = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    for name in ('euler', 'dpmpp_2m'):
        plan = make_plan(name, 10)
        assert_close(plan.start(noise, latents), latents+plan.sigmas[0]*noise)
        late = plan.after(4)
        assert_close(late.start(noise), plan.sigmas[4]*noise)
        assert late.sigmas==plan.sigmas[4:] and late.timesteps==plan.timesteps[4:]
    assert make_plan('ddim', 10, Schedule(steps_offset=0)).timesteps[-1]==0
    assert make_plan('ddim', 10, Schedule(steps_offset=3)).timesteps[-1]==3
    assert make_plan('euler', 10, Schedule(num_train_timesteps=500)).timesteps[0]==499
    said = read_schedule(dict(beta_start=.001, beta_end=.02, beta_schedule='linear'))
    assert said.steps_offset==0 and said.set_alpha_to_one is None           # as diffusers takes what is not said
    said = read_schedule(dict(beta_start=.001, beta_end=.02, beta_schedule='linear', steps_offset=1))
    assert make_plan('ddim', 5, said).sigmas[-1]==0<make_plan('pndm', 5, said).sigmas[-1]

def test_one_scheduler_object_serves_two_pictures_at_once():
    import diffusers
    from sdlearn.schedule import alphas_cumprod
    s = diffusers.UniPCMultistepScheduler.from_config(dict(beta_start=.00085, beta_end=.012,
                                                           beta_schedule='scaled_linear'))
    plan, x = make_plan(s, 5), torch.randn(1, 4, 4, 4)
    def bent(x, sigma, t): return torch.sin(x)/(1+sigma)
    pairs = [*zip(sample(plan, bent, plan.start(x)), sample(plan, bent, plan.start(-x)))]      # in turns
    assert_close(pairs[-1][0].x_next, last(plan, bent, plan.start(x)))
    assert_close(pairs[-1][1].x_next, last(plan, bent, plan.start(-x)))
    assert len(alphas_cumprod())==len(s.alphas_cumprod)

def test_seeds_count_on_from_the_first():
    from sdlearn.pipeline import _seeds
    assert _seeds(5, 3)==[5, 6, 7] and _seeds([9, 2], 2)==[9, 2] and len(set(_seeds(None, 4)))==4

def test_the_seed_alone_decides():
    from sdlearn.train import train_steps, trained
    def losses(seed, global_seed):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(.5), torch.nn.Linear(8, 1))
        torch.manual_seed(global_seed)
        return [s.loss for s in train_steps(lambda g: line_loss(net, g), trained(net), 4, seed)]
    assert losses(0, 1)==losses(0, 2)!=losses(1, 1)
    v, w = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.full((1,), float('inf')))
    assert not any(s.good for s in train_steps(lambda g: v.sum()**2, dict(v=v, w=w), 2))      # weights count too

def test_a_tenth_of_the_captions_is_empty():
    from sdlearn.pocket.recipe import unet_batch
    emb, rows = torch.stack([torch.zeros(3, 2), torch.ones(3, 2)]), torch.ones(8, dtype=torch.long)
    heard = []
    class Listens(Stub):
        def forward(self, x_in, t, words): return heard.append(words[:, 0, 0]) or 0*x_in+0*self.one
    unet_batch(torch.randn(8, 4, 2, 2), emb, rows, bs=4000)(Listens(), torch.Generator().manual_seed(0))
    assert abs(heard[0].mean().item()-.9)<.02

def test_words_are_found_where_they_stand():
    from sdlearn.attention import token_places
    from sdlearn.load import pocket_path
    from sdlearn.tokenizer import Tokenizer
    tokenizer = Tokenizer.from_folder(pocket_path()/'tokenizer')
    assert token_places(tokenizer, 'a picture of a cat on a beach', 'cat')==[5]
    assert token_places(tokenizer, 'a picture of a cat on a beach', 'on a beach')==[6, 7, 8]

# ---------------------------------------------------------------- configs and checkpoints

from sdlearn.configs import check_model, read_config, text_config, unet_config, vae_config  # noqa: E402

def defaults(init): # name -> default of everything that a class of the ecosystem can be told
    import inspect
    return {k: p.default for k, p in inspect.signature(init).parameters.items() if k not in ('self', 'kwargs')}

def others(value): # values that a config might say instead
    if value is None: return ['something', 2]
    if isinstance(value, bool): return [not value]
    if isinstance(value, str): return ['something']
    return [value*2+1] if isinstance(value, (int, float)) else []

def obeys(ours, theirs, ask): # with the same random weights
    real = randomized(theirs)
    try: ours.load_state_dict(real.state_dict())
    except RuntimeError: return False
    a, b = ask(ours.eval()), ask(real)
    return a.shape==b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)

def hold_to_the_table(known, ours, theirs, base, ask):
    "Every key that the ecosystem's class knows: refused, or the two networks agree"
    kept = refused = 0
    for key, usual in defaults(theirs.__init__).items():
        for value in others(usual)*(key not in base):
            said = base|{key: value}
            try: net = ours(said)
            except ValueError as e:
                assert key in str(e), (key, e)
                refused += 1
                continue
            assert key in known.used or key in known.idle, key
            try: real = theirs(**said)
            except Exception: continue                       # refused there
            assert obeys(net, real, ask), f'{key}={value!r} is taken, and gives another network'
            kept += 1
    return kept, refused

tiny_unet = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
                 layers_per_block=1, cross_attention_dim=12, attention_head_dim=2,
                 down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
tiny_vae = dict(block_out_channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16,
                down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4)
tiny_text = dict(vocab_size=49408, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 max_position_embeddings=77, hidden_act='quick_gelu', layer_norm_eps=1e-5)

@torch.no_grad()
def test_every_setting_of_a_network_is_obeyed_or_refused():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from sdlearn.unet import UNet
    from sdlearn.vae import VAE
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    def ask_unet(net):
        out = net(x, 300, words)
        return out if torch.is_tensor(out) else out.sample
    def ask_vae(net): return net.decoder(net.post_quant_conv(x))
    kept, refused = hold_to_the_table(unet_config, UNet, UNet2DConditionModel, tiny_unet, ask_unet)
    assert kept>=2 and refused>=30, (kept, refused)
    kept, refused = hold_to_the_table(vae_config, VAE, AutoencoderKL, tiny_vae, ask_vae)
    assert kept>=2 and refused>=6, (kept, refused)
    for known, base in ((unet_config, tiny_unet), (vae_config, tiny_vae)):     # what is used is in the ecosystem's words
        theirs = defaults((UNet2DConditionModel if known is unet_config else AutoencoderKL).__init__)
        for key, value in known.used.items(): assert theirs[key]==value, key

def test_settings_of_the_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel
    from sdlearn.text import TextEncoder, flat_keys
    theirs = CLIPTextConfig()
    for key, value in text_config.used.items(): assert getattr(theirs, key)==value, key
    ids = torch.randint(0, 49000, (2, 9))
    for odd in (dict(layer_norm_eps=.1), dict(hidden_act='gelu'), dict(num_attention_heads=3), dict(projection_dim=7)):
        real = randomized(CLIPTextModel(CLIPTextConfig(**tiny_text|odd)))
        ours = TextEncoder(real.config.to_dict()).eval()        # all that this version of transformers writes
        ours.load_state_dict(flat_keys(real.state_dict()))
        with torch.no_grad(): assert_close(ours(ids), real(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    for odd in (dict(hidden_act='relu'), dict(model_type='t5'), dict(born_tomorrow=1)):
        with pytest.raises(ValueError, match=next(iter(odd))): TextEncoder(tiny_text|odd)

@torch.no_grad()
def test_a_vaes_own_scale_is_obeyed():
    from diffusers import AutoencoderKL
    from sdlearn.vae import VAE, decode, encode
    theirs = randomized(AutoencoderKL(**tiny_vae, scaling_factor=.5))
    ours = VAE(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 16, 16)*2-1
    expected = theirs.encode(x).latent_dist.mean*.5
    for vae in (ours, theirs):
        assert_close(encode(vae, x), expected, rtol=1e-4, atol=1e-4)
        assert_close(decode(vae, expected), theirs.decode(expected/.5).sample, rtol=1e-4, atol=1e-4)

def test_pixels_of_another_range_are_not_guessed_at():
    from sdlearn.vae import VAE, encode
    vae = VAE(tiny_vae)
    for x in (torch.randint(0, 255, (1, 3, 16, 16)), torch.rand(1, 3, 16, 16)*255, torch.full((1, 3, 16, 16), float('nan')),
              torch.rand(1, 4, 16, 16), torch.rand(3, 16, 16), torch.rand(1, 3, 0, 0)):
        with pytest.raises(ValueError, match='expected'): encode(vae, x)
    with pytest.warns(UserWarning, match='0..1'): encode(vae, torch.rand(1, 3, 16, 16))

def old_names(unet, vae, text): # weights under the names of the first Stable Diffusion code
    n, floors = unet.config.layers_per_block, len(unet.config.block_out_channels)
    def res(k): # inside a residual block of the UNet
        for new, old in dict(norm1='in_layers.0', conv1='in_layers.2', time_emb_proj='emb_layers.1', norm2='out_layers.0',
                             conv2='out_layers.3', conv_shortcut='skip_connection').items(): k = k.replace(new, old)
        return k
    def unet_name(k):
        for new, old in dict(linear_1='0', linear_2='2').items():
            k = k.replace(f'time_embedding.{new}', f'time_embed.{old}')
        k = k.replace('conv_norm_out', 'out.0').replace('conv_out', 'out.2').replace('conv_in.', 'input_blocks.0.0.')
        if m := re.match(r'(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)', k):
            way, i, kind, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
            if kind=='downsamplers': return f'input_blocks.{(i+1)*(n+1)}.0.op.{rest.removeprefix("conv.")}'
            deep = 'CrossAttn' in unet.config.up_block_types[i]
            if kind=='upsamplers': return f'output_blocks.{i*(n+1)+n}.{1+deep}.{rest}'
            place = i*(n+1)+j+1 if way=='down' else i*(n+1)+j
            block = 'input_blocks' if way=='down' else 'output_blocks'
            return f'{block}.{place}.{0 if kind=="resnets" else 1}.{res(rest) if kind=="resnets" else rest}'
        for new, old in {'mid_block.resnets.0.': 0, 'mid_block.attentions.0.': 1, 'mid_block.resnets.1.': 2}.items():
            if k.startswith(new):
                rest = k.removeprefix(new)
                return f'middle_block.{old}.{res(rest) if "resnets" in new else rest}'
        return k
    def vae_name(k):
        m = re.match(r'(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.*)', k)
        if m:
            i = int(m[3]) if m[2]=='down' else len(vae.config.block_out_channels)-1-int(m[3])
            rest = m[4].replace('resnets.', 'block.').replace('conv_shortcut', 'nin_shortcut')
            return f'{m[1]}.{m[2]}.{i}.'+rest.replace('downsamplers.0', 'downsample').replace('upsamplers.0', 'upsample')
        k = k.replace('mid_block.resnets.0', 'mid.block_1').replace('mid_block.resnets.1', 'mid.block_2')
        k = k.replace('mid_block.attentions.0', 'mid.attn_1').replace('group_norm', 'norm').replace('to_out.0', 'proj_out')
        return k.replace('to_q', 'q').replace('to_k', 'k').replace('to_v', 'v').replace('conv_norm_out', 'norm_out')
    old = {'model.diffusion_model.'+unet_name(k): v for k, v in unet.state_dict().items()}
    old |= {'first_stage_model.'+vae_name(k): v[:, :, None, None] if 'attentions' in k and v.ndim==2 else v
            for k, v in vae.state_dict().items()}
    return old | {'cond_stage_model.transformer.text_model.'+k: v for k, v in text.state_dict().items()}

def tiny_networks():
    from sdlearn.text import TextEncoder
    from sdlearn.unet import UNet
    from sdlearn.vae import VAE
    configs = dict(unet=tiny_unet, vae=tiny_vae, text_encoder=tiny_text)
    return configs, dict(unet=randomized(UNet(tiny_unet)), vae=randomized(VAE(tiny_vae)),
                         text_encoder=randomized(TextEncoder(tiny_text)))

@pytest.mark.parametrize('networks', ['own', 'diffusers'])
def test_one_file_of_the_first_code_is_read(tmp_path, monkeypatch, networks):
    from safetensors.torch import save_file
    from sdlearn import folders, load
    configs, nets = tiny_networks()
    for extra, kind in (({}, 'epsilon'), (dict(v_pred=torch.zeros(1)), 'v_prediction')):
        old = old_names(nets['unet'], nets['vae'], nets['text_encoder'])
        save_file({k: v.contiguous() for k, v in (old|extra).items()}, tmp_path/'one.safetensors')
        monkeypatch.setattr(load, 'sd_v1', configs)
        monkeypatch.setattr(load, 'split_file', lambda file: folders.split_file(file, configs))
        sd = load.load_sd(str(tmp_path/'one.safetensors'), networks=networks)
        assert sd.schedule.prediction_type==kind and sd.guidance_scale==7.5
        for name, net in nets.items():
            from sdlearn.text import flat_keys
            got = getattr(sd, name).state_dict()
            if name=='text_encoder': got = flat_keys(got)
            assert got.keys()==net.state_dict().keys()
            for k, v in net.state_dict().items(): assert torch.equal(got[k], v), k
        sd.save(tmp_path/f'folder-{kind}')                       # and a folder comes of it
        again = load.load_sd(tmp_path/f'folder-{kind}', networks='own')
        assert again.schedule.prediction_type==kind and again.unet.config.cross_attention_dim==12

def test_loading_takes_none_of_the_readers_random_numbers():
    from sdlearn import judge
    from sdlearn.fast.decoder import load_small
    from sdlearn.fast.guided import GuidedUNet
    from sdlearn.load import load_sd
    from sdlearn.pocket.recipe import new_networks
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    sd = load_sd(networks='own', fast=True)
    judge._read_clip.cache_clear()
    judge.load_clip(), load_small(), new_networks(7)
    assert not GuidedUNet(sd.unet).cond_proj.weight.any()
    for net in (sd.unet, sd.vae, sd.text_encoder): assert {p.device.type for p in net.parameters()}=={'cpu'}
    for net in (sd.unet, sd.vae.decoder, load_small()):     # their weights lie as convolutions want them
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim==4)
    assert torch.equal(torch.rand(3), expected)

def test_parts_of_large_weights_are_put_together(tmp_path):
    from safetensors.torch import load_file, save_file
    from sdlearn.load import load_sd, pocket_path
    shutil.copytree(pocket_path(), tmp_path/'a')
    file = tmp_path/'a'/'unet'/'diffusion_pytorch_model.safetensors'
    state = load_file(file)
    names = sorted(state)
    file.unlink()
    index = {}
    for i, part in enumerate((names[:50], names[50:]), 1):
        name = f'diffusion_pytorch_model-0000{i}-of-00002.safetensors'
        save_file({k: state[k] for k in part}, file.with_name(name), metadata=dict(format='pt'))
        index |= {k: name for k in part}
    said = dict(metadata=dict(total_size=1), weight_map=index)
    file.with_name('diffusion_pytorch_model.safetensors.index.json').write_text(json.dumps(said))
    for networks in ('own', 'diffusers'):
        got = load_sd(tmp_path/'a', networks=networks).unet.state_dict()
        for k, v in state.items(): assert torch.equal(got[k], v.float()), k
    file.with_name(index[names[0]]).unlink()
    with pytest.raises(ValueError, match='2 parts'): load_sd(tmp_path/'a', networks='own')

def test_weights_that_are_no_numbers_to_calculate_with(tmp_path):
    from safetensors.torch import load_file, save_file
    from sdlearn.load import load_sd, pocket_path
    shutil.copytree(pocket_path(), tmp_path/'a')
    file = tmp_path/'a'/'vae'/'diffusion_pytorch_model.safetensors'
    save_file({k: v.to(torch.int8) for k, v in load_file(file).items()}, file)
    for networks in ('own', 'diffusers'):
        with pytest.raises(ValueError, match='I8'): load_sd(tmp_path/'a', networks=networks)

@torch.no_grad()
def test_stable_diffusion_2_is_drawn_by_diffusers_networks_and_refused_by_ours(tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from sdlearn import load_sd, txt2img
    from sdlearn.load import pocket_path, scheduler_config
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**tiny_unet|dict(attention_head_dim=(1, 2), use_linear_projection=True)).eval()
    text = CLIPTextModel(CLIPTextConfig(**tiny_text|dict(hidden_act='gelu'))).eval()
    said = dict(scheduler_config, prediction_type='v_prediction')
    pipe = StableDiffusionPipeline(AutoencoderKL(**tiny_vae).eval(), text, CLIPTokenizer.from_pretrained(pocket_path()/'tokenizer'),
                                   unet, DDIMScheduler.from_config(said), None, None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    theirs = pipe('a fox', negative_prompt='snow', num_inference_steps=4, generator=g, output_type='np').images[0]
    ours = txt2img(load_sd(tmp_path), 'a fox', 'snow', 4, seed=3, sampler='ddim', progress=False)[0]
    import numpy as np
    assert np.abs(np.asarray(ours)/255-theirs).max()<.01
    with pytest.raises(ValueError, match='attention_head_dim|use_linear_projection'): load_sd(tmp_path, networks='own')

def test_a_bundle_in_a_cell_is_a_few_lines():
    from sdlearn import load_sd
    text = repr(load_sd(networks='own'))
    assert len(text.split('\n'))==5 and '128 pixels' in text and str(root) not in text

# ---------------------------------------------------------------- numbers and pictures as people have them

def test_numbers_of_every_kind_are_the_same_numbers():
    import numpy as np
    from sdlearn import img2img, load_sd, txt2img
    from PIL import Image
    sd = load_sd(networks='own')
    how = dict(sampler='euler', progress=False)
    im = Image.new('RGB', (64, 64), 'red')
    def picture(n, scale, seed, side, strength):
        one = txt2img(sd, 'a cat', num_inference_steps=n, guidance_scale=scale, seed=seed, height=side, width=side, **how)[0]
        two = img2img(sd, 'a cat', im, strength, num_inference_steps=n, guidance_scale=scale, seed=seed, **how)[0]
        return one.tobytes()+two.tobytes()
    plain = picture(2, 2., 5, 64, .5)
    for whole, real in ((np.int64, np.float32), (np.uint8, np.float64), (torch.tensor, torch.tensor), (np.array, np.array)):
        assert picture(whole(2), real(2.), whole(5), whole(64), real(.5))==plain
    assert picture(2, 2, torch.Generator().manual_seed(5), 64, .5)!=plain       # the second goes on drawing from it
    for odd in (True, '2', 2.5, float('nan'), [2]):
        with pytest.raises(ValueError, match='num_inference_steps'): picture(odd, 2., 5, 64, .5)
    for odd in (True, '2', float('nan'), float('inf'), -1, [2]):
        with pytest.raises(ValueError, match='guidance_scale'): picture(2, odd, 5, 64, .5)
    for odd in (True, '.5', float('nan'), -.1, 1.1, None, [.5]):
        with pytest.raises(ValueError, match='strength'): img2img(sd, 'a cat', im, odd, num_inference_steps=2)
    for odd in (True, 0, -8, 65, 64., '64', float('nan')):
        with pytest.raises(ValueError, match='multiple of 8'): picture(2, 2., 5, odd, .5)
    for odd in (True, -1, 2**64, 1.5, '7', [1, 2], {}):
        with pytest.raises(ValueError, match='seed'): picture(2, 2., odd, 64, .5)

@pytest.mark.parametrize('name', samplers)
@pytest.mark.filterwarnings('ignore')
def test_one_step_and_a_thousand(name):
    from sdlearn import load_sd, txt2img
    sd = load_sd(networks='own')
    assert txt2img(sd, 'a cat', num_inference_steps=1, seed=1, sampler=name, progress=False)[0].size==(128, 128)
    seen = []
    def nothing(x, sigma, t):
        seen.append(t)
        return 0*x
    txt2img(sd, num_inference_steps=1000, seed=1, sampler=name, eps_fn=nothing, height=8, width=8, progress=False)
    assert len(seen)>=1000 and seen[0]==999 and seen[-1]==0

def heard(fn):
    import warnings
    with warnings.catch_warnings(record=True) as all_of_them:
        warnings.simplefilter('always')
        fn()
    return ' '.join(str(w.message) for w in all_of_them)

def test_what_will_not_be_heard_or_done_is_said():
    from PIL import Image
    from sdlearn import img2img, load_sd, txt2img
    from sdlearn.pipeline import start_step
    sd = load_sd(networks='own')
    def draw(negative, scale, **kw):
        return lambda: txt2img(sd, 'a cat', negative, 2, scale, seed=1, height=64, width=64, progress=False, **kw)
    assert 'not heard' in heard(draw('snow', 1)) and 'not heard' in heard(draw(['snow'], 1.))
    for negative, scale in ((None, 1), ('', 1), ('snow', 3), ([''], 1)): assert not heard(draw(negative, scale))
    im = Image.new('RGB', (64, 64), 'red')
    assert 'less than one' in heard(lambda: img2img(sd, 'a cat', im, .24, num_inference_steps=4, progress=False))
    assert not heard(lambda: start_step(4, .25)) and not heard(lambda: start_step(4, 0))
    assert 'trailing' in heard(draw(None, 3, sampler='ddim')) and not heard(draw(None, 3))
    for name, n in (('ddim', 501), ('ddpm', 600), ('pndm', 3)): assert 'trailing' in heard(lambda: make_plan(name, n))
    assert not heard(lambda: make_plan('ddim', 20)) and not heard(lambda: make_plan('ddim', 1000))
    import dataclasses
    assert not heard(lambda: make_plan('ddim', 1, dataclasses.replace(SD_V1, timestep_spacing='trailing')))

def test_small_rulers_do_not_guess():
    from PIL import Image
    from sdlearn.attention import word_map
    from sdlearn.core import image_grid, images_to_tensor, noise_like, tensor_to_images
    from sdlearn.idea.autoencoder import psnr
    from sdlearn.idea.contrast import retrieval
    from sdlearn.idea.classes import one_hot
    from sdlearn.idea.score import accuracy
    nan, im = torch.full((2, 3), float('nan')), Image.new('RGB', (8, 8))
    for fn in (lambda: accuracy(lambda x: nan, None, torch.zeros(2)), lambda: retrieval(nan, nan),
               lambda: psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)), lambda: one_hot([2.7]),
               lambda: word_map(dict(a=torch.rand(1, 1, 4, 77)), [], (8, 8)), lambda: word_map({}, [1], (8, 8)),
               lambda: image_grid([im, im.resize((4, 4))]), lambda: image_grid([]), lambda: image_grid([torch.zeros(3)]),
               lambda: images_to_tensor([im, im.resize((4, 4))]), lambda: tensor_to_images(torch.zeros(1, 4, 8, 8)),
               lambda: tensor_to_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), lambda: tensor_to_images(torch.full((1, 3, 8, 8), 255.)),
               lambda: noise_like(torch.zeros(3, 2), [torch.Generator()])):
        with pytest.raises(ValueError, match='expected'): fn()

def test_a_device_that_is_not_there_is_a_sentence():
    from sdlearn.load import usable_device
    assert usable_device('cpu').type=='cpu' and usable_device(torch.device('cpu')).type=='cpu'
    for odd in ('gpu', 'cuda:99', 'meta', 'mps', 7.5, ''):
        if odd=='mps' and torch.backends.mps.is_available(): continue
        with pytest.raises(ValueError, match='expected a device'): usable_device(odd)

# words

def both_tokenizers(folder=None):
    from transformers import CLIPTokenizer
    from sdlearn.load import pocket_path
    from sdlearn.tokenizer import Tokenizer
    folder = folder or pocket_path()/'tokenizer'
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)

def tokenizer_folder(path, config=None, special=None):
    "A copy of pocket's tokenizer that says something else about its padding"
    from sdlearn.load import pocket_path
    shutil.copytree(pocket_path()/'tokenizer', path)
    for name, said in (('tokenizer_config', config), ('special_tokens_map', special)):
        file = path/f'{name}.json'
        old = json.loads(file.read_text(encoding='utf8'))
        file.write_text(json.dumps({k: v for k, v in old.items() if k!='pad_token'}|(said or {})), encoding='utf8')
    return path

def texts(n, seed=0):
    "Strings of words, signs, numbers, accents, emoji and white space"
    import random
    rng = random.Random(seed)
    pieces = ['cat', 'A Red FOX', "it's", "we'LL", 'axolotl', '42', '!', '?!', '🦦', 'é', 'e\u0301', '猫', '&amp;', 'ﬁsh', '<|endoftext|>',
              ':', '(', ')', 'schÃ¶n', '½', '\n', '  ', '-', "'"]
    return [''.join(rng.choice(pieces)+rng.choice(['', ' ', ' ', ', ']) for _ in range(rng.randint(0, 12))) for _ in range(n)]

def test_marks_of_weights_are_read_and_all_else_is_text():
    from sdlearn.tokenizer import read_weights
    for typed, text, marks in (
            ('a (red:1.3) fox', 'a red fox', [('red', 1.3)]), ('(a cat:1.3) and (dog:.7)', 'a cat and dog', [('a cat', 1.3), ('dog', .7)]),
            ('((cat:1.2):1.5)', 'cat', [('cat', 1.2), ('cat', 1.5)]), ('(deep (snow:2):.5)', 'deep snow', [('snow', 2), ('deep snow', .5)]),
            ('(cat : +1. )s', 'cat s', [('cat ', 1)]), ('(a (b) c:2)', 'a (b) c', [('a (b) c', 2)]), ('((cat:1.2)', '(cat', [('cat', 1.2)]),
            ('(cat:1.2))', 'cat)', [('cat', 1.2)]), ('(a:1.2:1.3)', 'a:1.2', [('a:1.2', 1.3)]), ('(🦦:0) :)', '🦦 :)', [('🦦', 0)]),
            (r'(\(cat\):1.2)', '(cat)', [('(cat)', 1.2)]), (r'a \(cat:1.2\)', 'a (cat:1.2)', []), (r'\(a (b:2)', '(a b', [('b', 2)]),
            ('(1960:1.3)', '1960', [('1960', 1.3)]), ('(7 cats:2)', '7 cats', [('7 cats', 2)])):
        found, spans = read_weights(typed)
        assert found==text and [(text[a:b], w) for a, b, w in spans]==marks, typed
    for text in ('', 'a campfire (oil on canvas)', '(cat:)', '(cat:abc)', '(:1.2)', '( :1.2)', '(cat:1.2', 'cat:1.2)', 'a :) b', '(16:9)', '( 2.35 : 1 )',
                 '(cat:1.2.3)', '(cat:.)', '(cat:nan)', '(cat:inf)', '(cat:1e3)', '(cat:1,3)', '[cat:1.3]', '(cat)', '((cat))', '(cat:٣)', 'a\\b', ')(', '(2)', 'a fox (1)', '(a (2))'):
        assert read_weights(text)==(text, []), text
    for odd in ('(cat:13)', '(cat:-1)', '(cat:-.1)', '(cat:5.01)', '(cat:'+'9'*400+')', 'a (cat:1) (dog:6)'):
        with pytest.raises(ValueError, match='from 0 to 5'): read_weights(odd)
    with pytest.raises(ValueError, match='only strings'): read_weights(3)
    assert read_weights('(cat:5)')[1]==[(0, 3, 5.)]
    deep = '('*5000+'cat'+':1)'*5000
    assert read_weights(deep)[0]=='cat' and read_weights('('*100_000)==('('*100_000, [])
    assert read_weights('(fox (2):1.3)')==('fox (2)', [(0, 7, 1.3)])
    for letters in itertools.product('(): 2.a\\', repeat=5):    # whatever is typed, weights are found or there are none
        text, spans = read_weights(''.join(letters))
        assert all(0<=a<b<=len(text) and w in (2, .2, 2.2) for a, b, w in spans), letters

def test_weights_find_their_tokens():
    from sdlearn.tokenizer import all_ids, token_weights
    for tok in both_tokenizers():
        def weights(prompt, n): return [round(w, 3) for w in token_weights(tok, prompt).tolist()[:n]]
        assert weights('a (red:1.3) fox', 5)==[1, 1, 1.3, 1, 1] and token_weights(tok, 'x').tolist()==[1]*77
        assert weights('an (axolotl:1.5).', 8)==[1, 1, 1.5, 1.5, 1.5, 1.5, 1, 1]       # ax o lot l
        assert weights("(we:2)'ll (go:.5)", 5)==[1, 2, 1, .5, 1] and weights("we('ll:2) go", 4)==[1, 1, 2, 1]
        assert weights('a pup(py:2) and (cat:.5)fish', 6)==[1, 1, 2, 1, .5, 1]        # the whole word: puppy, catfish
        assert weights('(deep (snow:2):.5) (a:1) b', 6)==[1, .5, 1, 1, 1, 1]
        assert weights('(cat cat:2) cat (cat:3)', 6)==[1, 2, 2, 1, 3, 1]
        assert weights('(caf&eacute;:2)   (ﬁsh:3) it’s', 7)==[1, 2, 3, 1, 1, 1, 1]
        long = token_weights(tok, 'cat '*70+'(dog dog dog dog dog dog dog:2) (owl:3)')
        assert long.tolist()==[1]*71+[2]*5+[1]                                       # 75 fit; the end is no dog
        assert token_weights(tok, 'cat '*75+'(dog:2)').tolist()==[1]*77
        assert token_weights(tok, '(a:1.1) '*5000).tolist()==[1]+[pytest.approx(1.1)]*75+[1]
        for text in texts(200):                                                       # a mark anywhere, made from the text itself
            bare = text.replace('(', '').replace(')', '').replace(':', '')
            cut = len(bare)//3, len(bare)*2//3
            inside = bare[slice(*cut)]
            if not inside.strip() or inside.strip().isdigit(): continue
            typed = bare[:cut[0]]+'('+inside+':2.)'+bare[cut[1]:]
            got, ids = token_weights(tok, typed), all_ids(tok, bare)
            assert got[0]==1 and (got[len(ids)-1:]==1).all() and set(got.tolist())<={1., 2.}
            places = (got==2).nonzero().flatten().tolist()
            assert places==[*range(places[0], places[-1]+1)] if places else True
            few = all_ids(tok, bare[:cut[0]])[:-1]
            if ids[:len(few)]==few and places: assert places[0]==len(few)

@torch.no_grad()
def test_weights_move_embeddings_away_from_the_empty_prompt():
    from sdlearn import load_sd
    from sdlearn.pipeline import encode_prompt
    from sdlearn.text import embed_prompts, encode_tokens
    from sdlearn.tokenizer import tokenize
    sd = load_sd(networks='own')
    def plain(text): return encode_tokens(sd.text_encoder, tokenize(sd.tokenizer, text))
    def embed(prompts): return embed_prompts(sd.tokenizer, sd.text_encoder, prompts)
    nothing = plain('')
    for typed, text, weights in (('a (red:1.3) fox', 'a red fox', {2: 1.3}), ('(a cat:.5) and (dog:2)', 'a cat and dog', {1: .5, 2: .5, 4: 2}),
                                 ('((cat:1.2):1.5)', 'cat', {1: 1.8}), ('an (axolotl:0)', 'an axolotl', {2: 0, 3: 0, 4: 0, 5: 0})):
        expected = plain(text)
        for i, w in weights.items(): expected[0, i] = nothing[0, i]+w*(expected[0, i]-nothing[0, i])
        found = embed(typed)
        assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for i in {*range(77)}-{*weights}: assert torch.equal(found[0, i], plain(text)[0, i])
        assert_close(embed(['a dog', typed]), torch.cat([plain('a dog'), expected]), rtol=1e-5, atol=1e-5)
        assert_close(encode_prompt(sd, ['a dog'], typed)[:1], expected, rtol=1e-5, atol=1e-5)      # in the negative prompt too
    for text in ('a campfire (oil on canvas)', '(cat:)', 'a :) b', 'a screen (16:9)', 'A picture of a puppy.', ''):
        assert torch.equal(embed(text), plain(text))
    assert torch.equal(embed(r'a campfire \(oil on canvas\)'), plain('a campfire (oil on canvas)'))
    half = embed_prompts(sd.tokenizer, sd.text_encoder.bfloat16(), 'a (red:1.3) fox')
    assert half.dtype==torch.bfloat16 and half.isfinite().all()

def test_marks_do_not_count_where_words_are_looked_for(tmp_path):
    from sdlearn.attention import token_places
    for tok in (*both_tokenizers(), *both_tokenizers(tokenizer_folder(tmp_path/'v2', special=dict(pad_token='!')))):
        prompt = 'a (picture:.5) of a (CAT:1.3) on a (beach:2)'
        assert token_places(tok, prompt, 'cat')==token_places(tok, prompt, '(cat:2)')==[5]
        assert token_places(tok, prompt, 'on a beach')==[6, 7, 8]
        with pytest.raises(ValueError, match="'dog'"): token_places(tok, prompt, 'dog')

def said(f, *args, **kw):
    "What is warned of"
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        f(*args, **kw)
    return [str(w.message) for w in caught]

def test_what_is_cut_is_said_in_a_line():
    from sdlearn.tokenizer import tokenize
    for tok in both_tokenizers():
        few, = said(tokenize, tok, 'very '*73+'small black cat')
        assert "will not see 'cat'." in few and 'got 78' in few and 'more' not in few
        assert not said(tokenize, tok, 'very '*73+'black cat')
        book, = said(tokenize, tok, 'very '*75+' '.join(['one two three four five six seven eight nine ten eleven']+['word']*10000))
        assert "'one two three four five six seven eight nine ten' and 10001 more tokens" in book and len(book)<250
        assert len(said(tokenize, tok, 'a'*40000)[0])<400
        halved, = said(tokenize, tok, 'very '*74+'🦦 indeed')
        assert "'🦦 indeed'" in halved
        assert len(said(tokenize, tok, ['cat', 'cat '*80, 'dog '*90]))==2

def test_unseen_words_are_said_as_typed():
    from sdlearn import load_sd
    from sdlearn.pipeline import encode_prompt, unseen_words
    for networks in ('own', 'diffusers'):
        sd = load_sd(networks=networks)
        assert unseen_words(sd, 'an otter, a QUARK, a (quark:1.3) and 🦠🦠')==['quark', '🦠🦠'] and unseen_words(sd, '')==[]
        assert unseen_words(sd, 'cat '*75+'quark')==unseen_words(sd, 'cat '*74+'quark')==[]     # cut off: another warning says so
        assert said(encode_prompt, sd, ['a (cat:1.2)'])==[]
        names = ['xqz'+a+b for a in 'abcdefg' for b in 'jkv']
        cut, unseen = sorted(said(encode_prompt, sd, [' '.join(names*500)]), key=lambda s: 'never' in s)
        assert 'got' in cut and len(cut)<400 and len(unseen)<400
        assert ' more words' in unseen and unseen.count("'")==20 and "'xqzaj', 'xqzak'" in unseen

def test_arguments_that_a_tokenizer_does_not_know_are_refused():
    import numpy as np
    ours, theirs = both_tokenizers()
    some = ['a cat', 'a very small axolotl']
    for odd in (dict(padding='nonsense'), dict(padding=None), dict(return_tensors='tf'), dict(return_tensors=True), dict(truncation='nonsense')):
        with pytest.raises(ValueError, match=f'expected {[*odd][0]} to be one of'): ours(some, **odd)
    with pytest.raises(ValueError, match=r'lengths \[4, 9\]'): ours(some, return_tensors='np')
    for kw in (dict(padding=True), dict(padding='longest'), dict(padding='max_length', max_length=12), dict(padding='do_not_pad'),
               dict(padding=False), dict(padding='max_length', truncation='longest_first', max_length=5),
               dict(padding='do_not_pad', truncation='do_not_truncate', max_length=5)):
        a, b = ours(some, **kw), theirs(some, **kw)
        assert a.input_ids==b.input_ids and a.attention_mask==b.attention_mask, kw
    for kind in ('np', 'pt'):
        for what in (some, 'a cat'):
            a, b = (t(what, padding=True, return_tensors=kind) for t in (ours, theirs))
            for k in ('input_ids', 'attention_mask'):
                assert type(a[k]) is type(b[k]) and a[k].dtype==b[k].dtype and np.array_equal(a[k], b[k])

v2 = {'content': '!', 'lstrip': False, 'rstrip': False, 'normalized': True, 'single_word': False}
whole = {'0': v2|dict(special=True), '49407': v2|dict(content='<|endoftext|>', special=True)}

@pytest.mark.parametrize('config, special', [
    ({}, {}), (dict(pad_token='<|endoftext|>'), dict(pad_token='!')), (dict(pad_token='!'), dict(pad_token='<|endoftext|>')),
    (dict(pad_token='!'), {}), (dict(pad_token=v2|{'__type': 'AddedToken'}), {}), ({}, dict(pad_token=v2)),
    (dict(pad_token='!', added_tokens_decoder=whole), dict(pad_token='<|endoftext|>')),
    (dict(pad_token='<|endoftext|>', added_tokens_decoder=whole), dict(pad_token='!'))])
def test_padding_is_what_the_folder_says(tmp_path, config, special):
    from sdlearn.tokenizer import clean_text, tokenize
    ours, theirs = both_tokenizers(tokenizer_folder(tmp_path/'t', config, special))
    assert (ours.pad_token, ours.pad_token_id)==(theirs.pad_token, theirs.pad_token_id)
    for text in ('a cat!', '!', 'wow!!! a cat', '', *texts(50)):
        short = dict(padding='max_length', truncation=True, max_length=40)
        text = clean_text(text)
        assert said(ours, text, **short) is not None and ours(text, **short).input_ids==theirs(text, **short).input_ids, text
    assert torch.equal(tokenize(ours, ['a cat!', 'x']), tokenize(theirs, ['a cat!', 'x']))
    with pytest.raises(ValueError, match='pad token'): both_tokenizers(tokenizer_folder(tmp_path/'u', dict(pad_token='[PAD]')))

@pytest.mark.parametrize('pad', ['<|endoftext|>', '!'])
def test_one_file_holds_all_that_two_do(tmp_path, pad):
    from transformers import CLIPTokenizerFast
    from sdlearn.tokenizer import Tokenizer, clean_text
    theirs = CLIPTokenizerFast.from_pretrained(tokenizer_folder(tmp_path/'two', dict(pad_token=pad), dict(pad_token=pad)))
    theirs.save_pretrained(tmp_path/'one')
    for name in ('vocab.json', 'merges.txt'): (tmp_path/'one'/name).unlink(missing_ok=True)
    ours = Tokenizer.from_folder(tmp_path/'one')
    assert ours.vocab==theirs.get_vocab() and ours.pad_token_id==theirs.pad_token_id and len(ours)==49408
    for text in map(clean_text, texts(200)): assert ours.encode(text)==theirs(text).input_ids, text
    assert ours('a', padding='max_length').input_ids==theirs('a', padding='max_length', max_length=77).input_ids
    file = tmp_path/'one'/'tokenizer.json'
    old = json.loads(file.read_text(encoding='utf8'))
    pairs = old['model']['merges']
    old['model']['merges'] = [p if isinstance(p, str) else ' '.join(p) for p in pairs]      # as older versions wrote them
    file.write_text(json.dumps(old), encoding='utf8')
    assert Tokenizer.from_folder(tmp_path/'one').ranks==ours.ranks
    old['model']['merges'] = pairs[:-1]
    file.write_text(json.dumps(old), encoding='utf8')
    with pytest.raises(ValueError, match='cut off'): Tokenizer.from_folder(tmp_path/'one')

def test_half_a_tokenizer_is_refused(tmp_path):
    from sdlearn.tokenizer import Tokenizer
    folder = tokenizer_folder(tmp_path/'t')
    file = folder/'merges.txt'
    text = file.read_text(encoding='utf8')
    for cut in (text[:100_000], text[:text.rstrip().rindex('\n')], text.rstrip()[:-5], text.replace('i n\n', '', 1), '', text+'cat dog\n'):
        file.write_text(cut, encoding='utf8')
        with pytest.raises(ValueError, match='expected 48894 merges.*get vocab.json and merges.txt again'): Tokenizer.from_folder(folder)
    file.write_text(text.replace('\n', '\r\n'), encoding='utf8', newline='')                 # what git does on Windows
    assert Tokenizer.from_folder(folder).encode('a panda')==[49406, 320, 12952, 49407]
    file.write_text(text, encoding='utf8')
    vocab = json.loads((folder/'vocab.json').read_text(encoding='utf8'))
    (folder/'vocab.json').write_text(json.dumps({t: i for t, i in vocab.items() if i!=30000}), encoding='utf8')
    with pytest.raises(ValueError, match='got 48894'): Tokenizer.from_folder(folder)
    (folder/'vocab.json').unlink()
    with pytest.raises(ValueError, match='missing: vocab.json'): Tokenizer.from_folder(folder)

# ---------------------------------------------------------------- the rulers

def test_scenes_to_ask_for_are_as_held_out_as_they_say():
    from sdlearn.pocket.evaluate import examples, rivals
    from sdlearn.pocket.scenes import is_held_out
    for kind in ('style', 'background', 'color', 'count', 'relation'):
        for held in (False, True):
            asked = examples(kind, 20, held)
            assert len(set(asked))==20 and {is_held_out(s) for s in asked}=={held}
    assert examples('color', 5)==examples('color', 5)!=examples('color', 5, seed=1)
    with pytest.raises(ValueError, match='at most 0 held-out'): examples('subject', 1, held=True)
    sizes = dict(subject=763, style=9, background=22, color=10, count=4)
    for kind, size in sizes.items():
        scene = examples(kind, 1)[0]
        options = rivals(scene, kind)[kind]
        assert len(set(options))==size and scene in options

def test_relations_are_asked_three_ways():
    from sdlearn.pocket.evaluate import rivals
    from sdlearn.pocket.scenes import Scene
    scene = Scene('otter', relation='wearing', other='top hat')     # a hat is not of the core
    first, second, order = rivals(scene, 'relation').values()
    for options, changed, kept in ((first, 'subject', 'other'), (second, 'other', 'subject')):
        assert len({getattr(s, changed) for s in options})==120 and scene in options
        assert {getattr(s, kept) for s in options}=={getattr(scene, kept)}
    assert [(s.subject, s.other) for s in order]==[('otter', 'top hat'), ('top hat', 'otter')]

def test_a_pixel_judge_forgives_size_and_mirror_where_it_may():
    import numpy as np
    from PIL import Image
    from sdlearn.judge import pixel_features
    from sdlearn.pocket.evaluate import moved
    a = np.full((128, 128, 3), 255, np.uint8)
    a[40:90, 20:60] = (200, 30, 30)
    im = Image.fromarray(a)
    assert_close(moved(im)[1:2], pixel_features([im]), rtol=0, atol=1e-4)
    assert_close(moved(im)[4:5], pixel_features([im.transpose(0)]), rtol=0, atol=1e-4)
    assert moved(im, mirror=False).shape==(3, 3*64*64) and moved(im, side=8).shape==(6, 3*8*8)
    red = [(x.view(3, 64, 64)[1]<0).sum().item() for x in moved(im)[:3]]
    assert red[0]>red[1]>red[2]         # larger, as it is, smaller

def test_specks_are_counted_in_the_bottom_left_corner():
    from sdlearn.pocket.evaluate import specks
    spots = ((107, 20), (105, 20), (107, 22), (126, 20), (107, 1), (107, 20))
    x = torch.zeros(6, 3, 128, 128)
    back = x+.3                         # lighter all over is no speck
    for i, (row, col) in enumerate(spots): back[i, 1, row, col] -= .4
    back[5] *= .4                       # .16 is a faint one
    assert specks(x, back).tolist()==[True]+[False]*5
    assert specks(x, back, limit=.1).tolist()==[True]+[False]*4+[True]

def test_variety_is_the_mean_distance_of_pairs():
    from PIL import Image
    from sdlearn.pocket.evaluate import variety
    black, grey, white = (Image.new('RGB', (64, 64), (v,)*3) for v in (0, 51, 255))
    assert variety([[black, white]])==2 and variety([[black, black]])==0
    assert variety([[black, grey, white]])==round((.4+1.6+2)/3, 4)
    assert variety([[black, white], [grey, grey]])==1

def test_both_judges_name_what_was_drawn_and_refuse_what_was_shuffled():
    from dataclasses import replace
    from sdlearn.judge import load_clip
    from sdlearn.pocket.evaluate import named_right, true_pictures
    from sdlearn.pocket.scenes import Scene
    scenes = [Scene('fox', background=b) for b in ('snow', 'forest', 'red', 'yellow')]
    images = true_pictures(scenes)
    assert all(map(all, named_right(images, scenes, 'background', load_clip()).values()))
    wrong = named_right(images[1:]+images[:1], scenes, 'background', load_clip())
    assert not any(map(any, wrong.values()))
    three = [replace(Scene('fox'), count=3)]
    assert named_right(true_pictures(three), three, 'count', load_clip())['count', 'pixels']==[True]

def test_standard_error_of_a_share():
    from sdlearn.pocket.card import standard_error
    assert math.isclose(standard_error(.5, 100), .05) and math.isclose(standard_error(.9, 36), .05)

def test_the_card_says_the_numbers_of_its_file(tmp_path):
    from sdlearn.pocket.card import facts, model_card, update_facts, write_card
    from sdlearn.load import pocket_path
    assert model_card()==(pocket_path()/'README.md').read_text(encoding='utf8')
    row = dict(n=100, clip=.9, true_clip=.95)
    metrics = dict(settings=dict(steps=7), shares={'style, held out': row}, steps={},
                   guidance={'4': dict(n=3, subject=.75, score=.5, variety=.9)},
                   variety=dict(n=6, drawn=.2, true=.4, ratio=.5), vae=dict(n=8, psnr=26.5, error=.4, specks=3, faint=2, grounds=9))
    update_facts(tmp_path, subjects=12, failures=['torn'], training=['one run'], metrics=metrics)
    write_card(tmp_path)
    card = (tmp_path/'README.md').read_text(encoding='utf8')
    assert card.startswith('---\nlicense: apache-2.0\n') and card.split('---\n')[1].endswith('- cpu\n')
    assert '| style, held out | 100 | 0.900 ± 0.030 | 0.950 ± 0.022 |  |  |' in card
    for words in ('26.5 ± 0.4 dB on 8', '3 of 9', 'in 2 more', '| 4 | 3 | 0.75 | 0.5 | 0.9 |', '- torn', '- one run', 'steps 7'):
        assert ' '.join(words.split()) in ' '.join(card.split()), words
    update_facts(tmp_path, subjects=13)
    assert facts(tmp_path)['subjects']==13 and facts(tmp_path)['metrics']==metrics

# ---------------------------------------------------------------- lora

def lora_nets(seed=0):
    _, nets = tiny_networks()
    return {k: randomized(nets[k], seed) for k in ('unet', 'text_encoder')}

def lora_arrays(networks, names, rank=3, spell='{}.lora_{}.weight', words=('down', 'up')):
    "Random low-rank changes of some layers, spelled as somebody spells them: 'unet.conv_in' -> its two arrays"
    g, arrays, changes = torch.Generator().manual_seed(5), {}, {}
    for i, (name, said) in enumerate(names.items()):
        piece, layer = name.split('.', 1)
        w = networks[piece].get_submodule(layer).weight
        conv = w.ndim==4
        down = torch.randn(rank+i, *w.shape[1:], generator=g)
        up = torch.randn(len(w), rank+i, *(1, 1)[:2*conv], generator=g)
        arrays |= {spell.format(said, words[0]): down, spell.format(said, words[1]): up}
        changes[name] = torch.einsum('or,r...->o...', up.flatten(1), down)
    return arrays, changes

mid = 'mid_block.attentions.0.transformer_blocks.0.attn2'
lora_names = {f'unet.{mid}.to_q': f'unet_{mid}_to_q', f'unet.{mid}.to_out.0': f'unet_{mid}_to_out_0',
              'unet.down_blocks.0.resnets.0.conv1': 'unet_down_blocks_0_resnets_0_conv1',
              'unet.mid_block.attentions.0.proj_in': 'unet_mid_block_attentions_0_proj_in',
              'text_encoder.encoder.layers.0.self_attn.k_proj': 'te_text_model_encoder_layers_0_self_attn_k_proj'}
lora_names = {k: 'lora_'+v.replace('.', '_') for k, v in lora_names.items()}

def weights_of(nets): return {f'{p}.{k}': v.clone() for p, net in nets.items() for k, v in net.state_dict().items()}

def same_bits(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('kind', ['linear', 'conv1', 'conv3'])
def test_a_low_rank_layer_adds_scale_alpha_over_rank_up_down(kind):
    from torch import nn
    from sdlearn.adapt.lora import LowRank
    layer = dict(linear=lambda: nn.Linear(6, 10), conv1=lambda: nn.Conv2d(6, 10, 1),
                 conv3=lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1))[kind]()
    x = torch.randn(2, 5, 6) if kind=='linear' else torch.randn(2, 6, 7, 7)
    low = LowRank(layer, 3, alpha=6., generator=torch.Generator().manual_seed(0))
    assert torch.equal(low(x), layer(x)) and low.down.weight.std()>.1            # it starts at nothing
    assert_close(low.down.weight, LowRank(layer, 3, generator=torch.Generator().manual_seed(0)).down.weight)
    with torch.no_grad(): low.up.weight.normal_()
    low.scale = -.25
    wanted = layer(x)-.25*6/3*low.up(low.down(x))
    assert_close(low(x), wanted)
    merged = type(layer)(6, 10, 3, stride=2, padding=1) if kind=='conv3' else type(layer)(6, 10, *[1]*(kind=='conv1'))
    with torch.no_grad():
        merged.weight.copy_(low.weight)
        merged.bias.copy_(low.bias)
    assert_close(merged(x), wanted, rtol=1e-4, atol=1e-4)
    assert LowRank(layer, 3).alpha==3 and LowRank(layer, 3).strength==1
    half = LowRank(layer.half() if kind=='linear' else layer.bfloat16(), 3)       # coarse weights, fine changes
    assert half.down.weight.dtype==torch.float32 and half(x.to(layer.weight.dtype)).dtype==layer.weight.dtype

def test_each_layer_of_a_lora_file_has_its_own_alpha(tmp_path):
    from safetensors.torch import save_file
    from sdlearn.adapt.lora import merge_lora, read_lora
    nets = lora_nets()
    arrays, changes = lora_arrays(nets, lora_names)
    alphas = {name: 1.+i for i, name in enumerate(lora_names)}
    del alphas[[*alphas][1]]                                                        # without one: its rank
    for name, alpha in alphas.items(): arrays[f'{lora_names[name]}.alpha'] = torch.tensor(alpha)
    save_file(arrays, tmp_path/'k.safetensors')
    before = weights_of(nets)
    pairs = read_lora(tmp_path/'k.safetensors', **nets)
    assert {*pairs}=={*lora_names}
    assert [p.rank for p in pairs.values()]==[3+[*lora_names].index(k) for k in pairs]
    save_file({k.replace('lora_te_', 'lora_te1_'): v for k, v in arrays.items()}, tmp_path/'l.safetensors')
    assert read_lora(tmp_path/'l.safetensors', **nets).keys()==pairs.keys()         # as newer scripts call it
    undo = merge_lora(pairs, .5, **nets)
    after = weights_of(nets)
    for i, (name, change) in enumerate(changes.items()):
        w = f'{name}.weight'
        assert_close(after[w]-before[w], .5*alphas.get(name, 3+i)/(3+i)*change, rtol=1e-3, atol=1e-5)
        del after[w]
    for k, v in after.items(): assert torch.equal(v, before[k]), k
    undo()
    assert same_bits(weights_of(nets), before)

@pytest.mark.parametrize('spell, words', [
    ('{}.lora_{}.weight', ('A', 'B')), ('{}.lora.{}.weight', ('down', 'up')), ('{}.lora_{}.weight', ('down', 'up')),
    ('{}.lora_linear_layer.{}.weight', ('down', 'up')), ('{}.lora_{}.default.weight', ('A', 'B')),
    ('base_model.model.{}.lora_{}.weight', ('A', 'B'))])
def test_every_spelling_of_a_lora_is_read(tmp_path, spell, words):
    from safetensors.torch import save_file
    from sdlearn.adapt.lora import read_lora
    nets = lora_nets()
    names = {k: k.replace('text_encoder.', 'text_encoder.text_model.') for k in lora_names}
    arrays, changes = lora_arrays(nets, names, spell=spell, words=words)
    save_file(arrays, tmp_path/'a.safetensors')
    pairs = read_lora(tmp_path/'a.safetensors', **nets)
    for k, change in changes.items(): assert_close(pairs[k].change(change), change, rtol=1e-4, atol=1e-4)
    bare = {k.replace('unet.', ''): v for k, v in arrays.items() if 'text_encoder' not in k}  # only a UNet, without its name
    save_file(bare, tmp_path/'b.safetensors')
    assert len(read_lora(tmp_path/'b.safetensors', nets['unet']))==4
    old = {k.replace(f'{mid}.', f'{mid}.processor.').replace('.to_q.lora.', '.to_q_lora.').replace('.to_out.0.lora.', '.to_out_lora.'):
           v for k, v in lora_arrays(nets, names, spell='{}.lora.{}.weight')[0].items() if mid in k}
    assert all('_lora.' in k and '.processor.' in k for k in old)
    save_file(old, tmp_path/'c.safetensors')
    assert {*read_lora(tmp_path/'c.safetensors', nets['unet'])}=={f'unet.{mid}.to_q', f'unet.{mid}.to_out.0'}

@pytest.mark.parametrize('notes, alpha', [
    ({}, 3.), ({'unet.lora_alpha': 6.}, 6.), ({'unet.lora_alpha': 6, 'unet.alpha_pattern': {f'^{mid}.to_q': 2}}, 2.),
    ({'unet.lora_alpha': 6, 'unet.alpha_pattern': {'attn2.to_q': 1.5}}, 1.5), ({'text_encoder.lora_alpha': 9}, 3.),
    ({'unet.lora_alpha': 6, 'unet.alpha_pattern': {'attn2.to_k': 1.5}}, 6.),
    ({'unet.lora_alpha': 6, 'unet.use_rslora': True}, 6*3**.5)])
def test_alpha_in_the_notes_of_a_file(tmp_path, notes, alpha):
    from safetensors.torch import save_file
    from sdlearn.adapt.lora import read_lora
    nets = lora_nets()
    arrays, _ = lora_arrays(nets, {f'unet.{mid}.to_q': f'unet.{mid}.to_q'}, spell='{}.lora_{}.weight', words=('A', 'B'))
    save_file(arrays, tmp_path/'a.safetensors', metadata=dict(lora_adapter_metadata=json.dumps(notes)))
    [pair] = read_lora(tmp_path/'a.safetensors', nets['unet']).values()
    assert pair.alpha==pytest.approx(alpha)

@pytest.mark.parametrize('layout', ['diffusers', 'kohya'])
def test_a_lora_written_is_the_lora_read(tmp_path, layout):
    from safetensors import safe_open
    from sdlearn.adapt.lora import Pair, merge_lora, read_lora, save_lora
    nets, (_, changes) = lora_nets(), lora_arrays(lora_nets(), lora_names)
    arrays, _ = lora_arrays(nets, {k: k for k in lora_names})
    pairs = {k: Pair(arrays[f'{k}.lora_down.weight'], arrays[f'{k}.lora_up.weight'], 1.+i) for i, k in enumerate(lora_names)}
    file = save_lora(pairs, tmp_path/'x.safetensors', layout)
    again = read_lora(file, **nets)
    assert again.keys()==pairs.keys()
    for k, p in pairs.items():
        assert torch.equal(p.down, again[k].down) and torch.equal(p.up, again[k].up) and p.alpha==again[k].alpha
    with safe_open(file, 'pt') as f:
        keys, notes = {*f.keys()}, json.loads(f.metadata().get('lora_adapter_metadata', '{}'))
    if layout=='kohya': assert {k.split('.')[0] for k in keys}=={*lora_names.values()} and len(keys)==3*len(pairs)
    else:
        assert f'unet.{mid}.to_q.lora_A.weight' in keys and len(keys)==2*len(pairs)
        assert 'text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_B.weight' in keys
        assert notes['unet.r']==3 and {*notes['unet.rank_pattern'].values()}=={4, 5, 6}
    with pytest.raises(ValueError, match='pickles'): save_lora(pairs, tmp_path/'x.pt')
    with pytest.raises(ValueError, match="'diffusers' or 'kohya'"): save_lora(pairs, file, 'mine')

def test_loras_add_up_and_leave_no_trace(tmp_path):
    from sdlearn.adapt.lora import Pair, save_lora
    from sdlearn.load import SD
    nets = lora_nets()
    sd = SD(None, nets['text_encoder'], torch.nn.Identity(), nets['unet'], tmp_path)
    name = f'{mid}.to_q'
    w = sd.unet.get_submodule(name).weight
    first, bits = w.clone(), weights_of(nets)
    g = torch.Generator().manual_seed(0)
    pair = Pair(torch.randn(2, w.shape[1], generator=g), torch.randn(len(w), 2, generator=g), 1.)
    change = .5*pair.up@pair.down
    file = save_lora({f'unet.{name}': pair}, tmp_path/'x.safetensors')
    assert sd.load_lora(file) is sd
    assert_close(w, first+change)
    once = w.clone()
    sd.load_lora(str(file), scale=.5)
    assert_close(w, first+1.5*change) and len(sd.undo)==2
    sd.undo.pop()()
    assert torch.equal(w, once)                                       # the last first
    sd.load_lora(file, -3.)
    assert_close(w, first-2*change)
    assert sd.unload() is sd and same_bits(weights_of(nets), bits) and not sd.undo
    with pytest.raises(ValueError, match='finite scale'): sd.load_lora(file, float('inf'))
    assert not sd.undo
    sd.unet.half()
    halved = weights_of(nets)
    sd.load_lora(file)
    assert w.dtype==torch.float16 and not torch.equal(w, halved[f'unet.{name}.weight'])
    sd.unload()
    assert same_bits(weights_of(nets), halved)

def lora_task():
    unet = lora_nets()['unet']
    g = torch.Generator().manual_seed(1)
    return unet, torch.randn(3, 4, 8, 8, generator=g), torch.randn(1, 77, tiny_unet['cross_attention_dim'], generator=g)

def test_only_the_low_rank_numbers_are_trained_and_a_resumed_training_goes_on(tmp_path):
    from sdlearn.adapt.lora import LowRank, learn_lora, lora_loss, merge_lora, read_lora, save_lora
    from sdlearn.train import load_state
    unet, latents, words = lora_task()
    before, loss = weights_of(dict(unet=unet)), lora_loss(latents, words, bs=2)
    kw = dict(rank=2, alpha=1., progress=False)
    unet.requires_grad_(True)                                          # as somebody may have left it
    straight = learn_lora(unet, loss, 6, **kw)
    assert same_bits(weights_of(dict(unet=unet)), before) and all(p.requires_grad for p in unet.parameters())
    assert all(p.up.abs().sum()>0 and p.rank==2 and p.alpha==1 for p in straight.values())
    half = learn_lora(unet, loss, 3, tmp_path/'s', **kw)
    state = load_state(tmp_path/'s')
    assert len(state['params'])==len(state['averaged'])==2*len(straight) and all('.down.' in k or '.up.' in k for k in state['params'])
    seen = {}
    def look(net, step): # the file written on the way draws what the run draws on the way
        from sdlearn.adapt.lora import lora_pairs
        save_lora(lora_pairs(unet=net), tmp_path/'p.safetensors')
        with torch.no_grad(): seen[step] = net(latents, 500, words.expand(3, -1, -1))
    resumed = learn_lora(unet, loss, 6, tmp_path/'s', preview=look, preview_every=5, **kw)
    for k, p in straight.items():
        assert torch.equal(p.up, resumed[k].up) and torch.equal(p.down, resumed[k].down)
        assert not torch.equal(p.up, half[k].up)
    with pytest.raises(ValueError, match='another'): learn_lora(unet, loss, 6, tmp_path/'s', **kw|dict(alpha=2.))
    undo = merge_lora(read_lora(tmp_path/'p.safetensors', unet), unet=unet)
    with torch.no_grad(): assert_close(unet(latents, 500, words.expand(3, -1, -1)), seen[5], rtol=1e-4, atol=1e-4)
    undo()
    def spoilt(net, g): return loss(net, g)*float('nan')
    with pytest.raises(FloatingPointError, match='step 0'): learn_lora(unet, spoilt, 3, **kw)
    assert same_bits(weights_of(dict(unet=unet)), before)
    assert not any(isinstance(m, LowRank) for m in unet.modules())

def test_the_loss_of_a_lora_is_that_of_noise():
    from sdlearn.adapt.lora import lora_loss
    from sdlearn.denoiser import noise_loss
    from sdlearn.schedule import SD_V1, sigma_at
    from dataclasses import replace
    unet, latents, words = lora_task()
    each = torch.cat([words, 2*words, 3*words])
    for kind in ('epsilon', 'v_prediction'):
        got = lora_loss(latents, each, 5, replace(SD_V1, prediction_type=kind))(unet, torch.Generator().manual_seed(3))
        g = torch.Generator().manual_seed(3)
        i, t = torch.randint(3, (5,), generator=g), torch.randint(1000, (5,), generator=g)
        noise = torch.randn(5, 4, 8, 8, generator=g)
        assert_close(got, noise_loss(lambda x, s, c: unet(x, t, c), latents[i], each[i], sigma_at(t), noise, kind))
    unet.to(torch.bfloat16)                                            # a frozen network of half precision
    assert lora_loss(latents, words, 2)(unet, torch.Generator().manual_seed(0)).dtype==torch.float32

def test_drawing_sees_a_lora_that_is_beside_the_weights():
    from sdlearn.adapt.lora import lora_pairs, merge_lora, put_lora, take_lora
    from sdlearn.denoiser import noise_predictor
    unet, latents, words = lora_task()
    low = put_lora(unet, 2, seed=3)
    with pytest.raises(ValueError, match='takes them off'): put_lora(unet, 2)
    with pytest.raises(ValueError, match='unet=, text_encoder='): merge_lora({'text_encoder.x': None}, unet=unet)
    with torch.no_grad():
        for m in low.values(): m.up.weight.normal_()
        beside = noise_predictor(unet, words.repeat(6, 1, 1), 2.)(latents, 3., 700)
        pairs = lora_pairs(unet=take_lora(unet) and unet) or None
        assert pairs is None                                           # taken off: nothing is left to copy
        for name, m in low.items(): unet.get_submodule(name).weight.copy_(m.weight)
        assert_close(beside, noise_predictor(unet, words.repeat(6, 1, 1), 2.)(latents, 3., 700), rtol=1e-4, atol=1e-4)

def test_lora_names_are_those_of_diffusers():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from sdlearn.adapt.lora import lora_layers, lora_pairs, put_lora
    nets = lora_nets()
    theirs = UNet2DConditionModel(**tiny_unet)
    assert [*lora_layers(theirs)]==[*lora_layers(nets['unet'])]
    assert all(k.endswith(('to_q', 'to_k', 'to_v', 'to_out.0')) for k in lora_layers(theirs))
    text = CLIPTextModel(CLIPTextConfig(**tiny_text))
    for both in ((theirs, nets['unet']), (text, nets['text_encoder'])):
        for net in both: put_lora(net, 2)
    one, two = lora_pairs(unet=theirs, text_encoder=text), lora_pairs(**nets)
    assert {*one}=={*two} and all(torch.equal(one[k].down, two[k].down) for k in one)     # also where they start
    other = put_lora(lora_nets()['unet'], 2, seed=1)[f'{mid}.to_q'].down.weight
    assert other.std()>.1 and not torch.equal(other, two[f'unet.{mid}.to_q'].down)

@pytest.mark.parametrize('harm, words', [
    (lambda a: {k: v.repeat(1, 2) if 'down' in k and v.ndim==2 else v for k, v in a.items()}, f'has .*{mid}.to_q .*another one'),
    (lambda a: {k: v[:2] if 'down' in k else v for k, v in a.items()}, 'has 5 others'),
    (lambda a: {k: v*float('nan') for k, v in a.items()}, 'finite numbers'),
    (lambda a: {k.replace('lora_', 'xl_'): v for k, v in a.items()}, 'nothing in x.safetensors fits'),
    (lambda a: {k: v for k, v in a.items() if 'up' not in k.rpartition('.lora')[2]}, 'nothing in x.safetensors fits'),
    (lambda a: {}, 'nothing in')])
def test_loras_that_do_not_fit_are_refused(tmp_path, harm, words):
    from safetensors.torch import save_file
    from sdlearn.adapt.lora import read_lora
    nets = lora_nets()
    arrays, _ = lora_arrays(nets, lora_names)
    save_file(harm(arrays), tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match=words): read_lora(tmp_path/'x.safetensors', **nets)

def test_what_has_no_place_in_a_lora_file_is_listed(tmp_path):
    from safetensors.torch import save_file
    from sdlearn.adapt.lora import read_lora
    nets = lora_nets()
    arrays, _ = lora_arrays(nets, lora_names)
    first = [*lora_names.values()][0]
    more = arrays|{f'{first}.dora_scale': torch.ones(2), 'lora_unet_elsewhere.lora_down.weight': torch.ones(2, 2),
                   'lora_te2_text_model_x.lora_up.weight': torch.ones(2, 2)}
    save_file(more, tmp_path/'x.safetensors')
    with pytest.warns(UserWarning) as said: pairs = read_lora(tmp_path/'x.safetensors', **nets)
    assert [*lora_names][0] not in pairs and len(pairs)==4
    for word in ('5 arrays', 'dora_scale', 'elsewhere', 'lora_te2', f'{first}.lora_up.weight'): assert word in str(said[0].message)
    save_file(arrays, tmp_path/'y.safetensors')
    with pytest.warns(UserWarning, match='2 arrays .*lora_te_'): assert len(read_lora(tmp_path/'y.safetensors', nets['unet']))==4
    (tmp_path/'z.safetensors').write_bytes((tmp_path/'y.safetensors').read_bytes()[:300])
    for name, words in (('z.safetensors', 'damaged'), ('y.ckpt', 'pickles')):
        with pytest.raises(ValueError, match=words): read_lora(tmp_path/name, nets['unet'])
    with pytest.raises(FileNotFoundError, match='Check the path'): read_lora(tmp_path/'none.safetensors', nets['unet'])

# ---------------------------------------------------------------- dreambooth

def test_the_second_loss_is_added_with_its_weight():
    from sdlearn.adapt.dreambooth import prior_loss
    asked = []
    def first(net, g): return torch.tensor(2.)*net
    def second(net, g):
        asked.append(g)
        return torch.tensor(3.)*net
    assert prior_loss(first, second)(10., 'g')==50 and prior_loss(first, second, .5)(10., 'g')==35
    assert asked==['g', 'g'] and prior_loss(first, second, 0)(10., 'g')==20 and len(asked)==2   # not even asked
    for weight in (-1., float('nan'), 'much'):
        with pytest.raises(ValueError, match='expected a weight'): prior_loss(first, second, weight)

def test_memory_is_the_change_of_the_answer():
    import copy
    from sdlearn.adapt.dreambooth import memory_loss
    from sdlearn.schedule import random_timesteps, sigma_at
    unet, latents, words = lora_task()
    words = words+torch.arange(3.)[:, None, None]
    old = copy.deepcopy(unet)
    loss, rng = memory_loss(latents, words, old, bs=4), lambda: torch.Generator().manual_seed(7)
    assert loss(unet, rng())==0
    with torch.no_grad(): unet.conv_out.weight.mul_(1.5)
    for net in (unet, old): net.requires_grad_(True)
    said = loss(unet, rng())
    said.backward()
    assert unet.conv_out.weight.grad.abs().sum()>0 and all(p.grad is None for p in old.parameters())
    g = rng()                                                                   # by hand
    i, t = torch.randint(3, (4,), generator=g), random_timesteps(4, g)
    noise, s = torch.randn(4, *latents.shape[1:], generator=g), sigma_at(t)[:, None, None, None]
    x = (latents[i]+s*noise)/(1+s**2)**.5
    with torch.no_grad(): assert_close(said.detach(), (unet(x, t, words[i])-old(x, t, words[i])).square().mean())
    one = memory_loss(latents, words[:1], old, bs=4)(unet, rng())
    assert_close(one, memory_loss(latents, words[:1].repeat(3, 1, 1), old, bs=4)(unet, rng()))

def test_drift_is_measured_in_distances_between_seeds():
    from PIL import Image
    from sdlearn.adapt.dreambooth import drift, moved
    corners = torch.tensor([[0., 0.], [3., 0.], [0., 4.]])
    assert moved(corners, corners)==0 and abs(moved(corners, corners+torch.tensor([3., 4.]))-5/4)<1e-6
    assert abs(moved(corners, torch.cat([corners[:2], torch.tensor([[0., 16.]])]))-1)<1e-6      # a mean over seeds
    grey = lambda *levels: [Image.new('RGB', (128, 128), (v, v, v)) for v in levels]
    assert abs(drift(grey(20, 120), grey(70, 170))['pixels']-.5)<1e-3
    assert drift(grey(20, 120), grey(20, 120))==dict(encoder=0, pixels=0)
    for before, after in (((1, 2), (1,)), ((1,), (1,))):
        with pytest.raises(ValueError, match='same two or more seeds'): drift(grey(*before), grey(*after))
    with pytest.raises(ValueError, match='several seeds'): drift(grey(7, 7), grey(8, 9))

def test_all_weights_are_trained_and_put_back(tmp_path):
    from sdlearn.adapt.dreambooth import learn_all, prior_loss
    from sdlearn.adapt.lora import lora_loss
    unet, latents, words = lora_task()
    before, loss = weights_of(dict(unet=unet)), lora_loss(latents, words, bs=2)
    def changed(): return [k for k, v in weights_of(dict(unet=unet)).items() if not torch.equal(v, before[k])]
    undo = learn_all(unet, prior_loss(loss, loss), 3, tmp_path/'s', progress=False)
    after = weights_of(dict(unet=unet))
    assert len(changed())==len(before) and not any(p.requires_grad for p in unet.parameters())
    undo()
    assert not changed()
    learn_all(unet, prior_loss(loss, loss), 3, tmp_path/'s', progress=False)    # it has been there
    assert same_bits(weights_of(dict(unet=unet)), after)
    undo()
    with pytest.raises(ValueError, match='another'): learn_all(unet, prior_loss(loss, loss, .5), 3, tmp_path/'s', progress=False)
    def spoilt(net, g): return loss(net, g)*(float('nan') if g.initial_seed()>1_000_003*64 else 1)
    with pytest.raises(FloatingPointError): learn_all(unet, spoilt, 3, seed=1, progress=False)
    assert not changed() and not any(p.requires_grad for p in unet.parameters())

def test_dreambooth_reads_pictures_and_refuses(bundles):
    from PIL import Image
    from sdlearn.adapt.dreambooth import class_pictures, encode_pairs, learn_dreambooth
    from sdlearn.core import images_to_tensor
    from sdlearn.pipeline import txt2img
    from sdlearn.pocket.scenes import render
    from sdlearn.vae import encode
    sd, fox = bundles['own'], 'a picture of a fox'
    drawn = class_pictures(sd, fox, 9, seed=5, num_inference_steps=1)
    assert len(drawn)==9 and drawn[8]==txt2img(sd, fox, seed=13, num_inference_steps=1, progress=False)[0]
    grey = [Image.new('L', (90, 140), 200), Image.new('P', (128, 128))]
    latents, words = encode_pairs(sd, grey, fox)
    assert latents.shape==(2, 4, 16, 16) and words.shape==(1, 77, 128)
    seen = render('deer', seed=1)[0]
    with torch.no_grad(): assert_close(encode_pairs(sd, [seen], fox)[0], encode(sd.vae, images_to_tensor([seen])), rtol=1e-3, atol=1e-3)
    one, each = encode_pairs(sd, grey[:1], [fox]), encode_pairs(sd, grey, [fox, 'a picture of a cat'])
    assert_close(one[0], latents[:1], rtol=1e-3, atol=1e-3)
    assert_close(each[1][:1], words, rtol=1e-3, atol=1e-3)
    assert each[1].shape==(2, 77, 128) and (each[1][0]-each[1][1]).norm()>5
    for ims, prompt, kind, kw, said in (([], 'x', fox, {}, 'at least one picture'), (grey, [fox]*3, 'a', {}, '2 pictures and 3 prompts'),
                                        (grey, fox, fox, {}, 'rare word'), (grey, 'x', fox, dict(n=0), 'number of class pictures'),
                                        (grey, 'x', fox, dict(n=2.5), 'number of class pictures')):
        with pytest.raises(ValueError, match=said): learn_dreambooth(sd, ims, prompt, kind, steps=1, progress=False, **kw)

# ---------------------------------------------------------------- imagic

def imagic_sd(tmp_path):
    from sdlearn.load import SD, load_sd
    _, nets = tiny_networks()
    return SD(load_sd(networks='own').tokenizer, nets['text_encoder'], nets['vae'], nets['unet'], tmp_path)

def test_a_network_that_is_told_one_table_hears_no_other():
    from sdlearn.adapt.imagic import Told
    unet, latents, words = lora_task()
    told = Told(unet, words)
    with torch.no_grad():
        assert_close(told(latents, 500, 7*words.expand(3, -1, -1)), unet(latents, 500, words.expand(3, -1, -1)))
        told.words.add_(1.)
        assert_close(told(latents, 500, None), unet(latents, 500, words.expand(3, -1, -1)+1))
        unet.to(torch.bfloat16)                                            # a frozen network of half precision
        assert told(latents, 500, None).dtype==torch.bfloat16 and told.words.dtype==torch.float32

def test_only_the_table_is_trained_and_its_loss_falls():
    from sdlearn.adapt.imagic import learn_sentence
    from sdlearn.adapt.lora import lora_loss
    unet, latents, words = lora_task()
    loss, before = lora_loss(latents, words, 4), weights_of(dict(unet=unet))
    for asked in (True, False):                                            # as somebody may have left it
        unet.requires_grad_(asked)
        found = learn_sentence(unet, loss, words, 8, lr=.05, progress=False)
        assert same_bits(weights_of(dict(unet=unet)), before) and all(p.requires_grad==asked for p in unet.parameters())
    def at(w):
        with torch.no_grad(): return lora_loss(latents, w, 32)(unet, torch.Generator().manual_seed(7))
    assert found.shape==words.shape and at(found)<at(words)-1e-4
    assert torch.equal(learn_sentence(unet, loss, words, 0, progress=False), words)
    with pytest.raises(ValueError, match='1,77,D'): learn_sentence(unet, loss, words[0], 1)

def test_between_is_the_picture_at_0_and_the_wish_at_1():
    import numpy as np
    from sdlearn.adapt.imagic import between
    found, wanted = torch.randn(1, 77, 6), torch.randn(1, 77, 6)
    got = between(found, wanted, [0, .25, 1, 1.5])
    assert_close(got, torch.cat([found, .75*found+.25*wanted, wanted, 1.5*wanted-.5*found]))
    assert torch.equal(between(found, wanted, np.float32(1)), wanted)
    for odd in ('half', [], [None], [float('nan')]):
        with pytest.raises(ValueError, match='shares'): between(found, wanted, odd)

def test_an_edit_is_found_first_and_tuned_at_what_was_found(tmp_path):
    from PIL import Image
    from sdlearn.adapt.imagic import between, draw_edit, learn_edit, learn_sentence
    from sdlearn.adapt.lora import learn_lora, lora_loss, merge_lora
    from sdlearn.core import images_to_tensor
    from sdlearn.pipeline import generate_with_embs
    from sdlearn.text import embed_prompts
    from sdlearn.vae import encode
    sd, kw = imagic_sd(tmp_path), dict(progress=False)
    side = sd.unet.config.sample_size*8
    picture = Image.effect_noise((side, side), 90).convert('RGB')
    bits = weights_of(dict(unet=sd.unet))
    edit = learn_edit(sd, picture, 'a fox in a hat', steps=(3, 2), rank=2, lr=(.03, .02), seed=5, **kw)
    with torch.no_grad():
        latents, wanted = encode(sd.vae, images_to_tensor(picture)), embed_prompts(sd.tokenizer, sd.text_encoder, 'a fox in a hat')
    assert_close(edit.wanted, wanted)
    found = learn_sentence(sd.unet, lora_loss(latents, wanted, 4, sd.schedule), wanted, 3, lr=.03, seed=5, **kw)
    assert_close(edit.found, found)
    assert not torch.equal(found, wanted)
    pairs = learn_lora(sd.unet, lora_loss(latents, found, 4, sd.schedule), 2, rank=2, lr=.02, seed=5, **kw)
    for k, p in pairs.items(): assert_close(edit.pairs[k].up, p.up)
    assert same_bits(weights_of(dict(unet=sd.unet)), bits)
    drawn = draw_edit(sd, edit, [.5, 1], seed=3, num_inference_steps=2, **kw)
    assert same_bits(weights_of(dict(unet=sd.unet)), bits)                  # the LoRA is off again
    undo = merge_lora(pairs, unet=sd.unet)
    want = generate_with_embs(sd, between(found, wanted, [.5, 1]), 2, seed=[3, 3], **kw)
    undo()
    assert [a.tobytes() for a in drawn]==[b.tobytes() for b in want]
    for bad, said in (((None, 'x'), 'one PIL picture'), (([picture], 'x'), 'one PIL picture'), ((picture, ''), 'become')):
        with pytest.raises(ValueError, match=said): learn_edit(sd, *bad, **kw)
    for bad in (3, (3,), (1, 2, 3)):
        with pytest.raises(ValueError, match='two numbers'): learn_edit(sd, picture, 'x', steps=bad, **kw)
        with pytest.raises(ValueError, match='two numbers'): learn_edit(sd, picture, 'x', lr=bad, **kw)
    with pytest.raises(ValueError): draw_edit(sd, edit, ['half'])
    assert same_bits(weights_of(dict(unet=sd.unet)), bits)

def test_an_edit_survives_its_file(tmp_path):
    import warnings
    from dataclasses import replace
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from sdlearn.adapt.imagic import draw_edit, learn_edit, read_edit, save_edit
    from sdlearn.adapt.lora import save_lora
    sd, kw = imagic_sd(tmp_path), dict(progress=False)
    side = sd.unet.config.sample_size*8
    bits = weights_of(dict(unet=sd.unet))
    edit = learn_edit(sd, Image.effect_noise((side, side), 90).convert('RGB'), 'a fox in a hat', steps=(3, 2), rank=2, lr=(.03, .02), **kw)
    edit.shares = -.5, 1.25
    for p in edit.pairs.values(): p.alpha = 1.5                            # not the rank
    file = save_edit(edit, tmp_path/'new'/'hat.safetensors')
    with warnings.catch_warnings(action='error'): back = read_edit(file, sd)
    assert back.sentence==edit.sentence=='a fox in a hat' and back.shares==(-.5, 1.25)
    assert torch.equal(back.found, edit.found) and torch.equal(back.wanted, edit.wanted) and not torch.equal(back.found, back.wanted)
    assert {*back.pairs}=={*edit.pairs}
    for k, p in edit.pairs.items():
        assert torch.equal(p.down, back.pairs[k].down) and torch.equal(p.up, back.pairs[k].up) and back.pairs[k].alpha==1.5
    drawn = [draw_edit(sd, e, [0, 1], seed=3, num_inference_steps=2, **kw) for e in (edit, back)]
    assert drawn[0]==drawn[1] and same_bits(weights_of(dict(unet=sd.unet)), bits)
    with pytest.warns(UserWarning, match='imagic'): sd.load_lora(file)      # its LoRA is one like any other
    assert not same_bits(weights_of(dict(unet=sd.unet)), bits)
    sd.unload()
    arrays, note = load_file(file), json.dumps(dict(sentence='a fox in a hat', shares=[0, 1]))
    def odd(change={}, drop=(), note=note):
        kept = {k: v for k, v in (arrays|change).items() if k not in drop}
        save_file(kept, tmp_path/'odd.safetensors', dict(imagic=note) if note else None)
        return tmp_path/'odd.safetensors'
    assert read_edit(odd(), sd).shares==(0, 1)
    up = next(k for k in arrays if 'lora_B' in k)
    layer = up.removesuffix('.lora_B.weight')
    nan = arrays['imagic.found'].clone()
    nan[0, 3, 1] = float('nan')
    for bad, said in ((lambda: odd(dict({'imagic.found': arrays['imagic.found'][..., :-1].contiguous()})), 'another checkpoint'),
                      (lambda: odd(dict({'imagic.found': nan})), 'finite'),
                      (lambda: odd(dict({'imagic.wanted': arrays['imagic.wanted'].flip(1)})), 'other numbers'),
                      (lambda: odd(drop=['imagic.found']), 'expected an edit'), (lambda: odd(note=None), 'expected an edit'),
                      (lambda: odd(note='{}'), 'two shares'), (lambda: odd(note='[1]'), 'two shares'), (lambda: odd(note='{"sentence": "a", "shares": [1, 0]}'), 'two shares'),
                      (lambda: odd({up: arrays[up][:-1].contiguous()}), 'low-rank changes that fit'),
                      (lambda: odd({up: arrays[up]*float('inf')}), 'finite'),
                      (lambda: odd({k.replace(layer, 'unet.no.such'): v for k, v in arrays.items() if k.startswith(layer+'.')}, [k for k in arrays if k.startswith(layer+'.')]),
                       'layers for this network'),
                      (lambda: odd(dict(junk=nan)), 'layers for this network'),
                      (lambda: save_lora(edit.pairs, tmp_path/'lora.safetensors'), 'expected an edit'), (lambda: tmp_path/'x.pt', 'pickles'), (lambda: None, 'a .safetensors file')):
        with pytest.raises(ValueError, match=said): read_edit(bad(), sd)
    (tmp_path/'torn.safetensors').write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match='damaged or truncated'): read_edit(tmp_path/'torn.safetensors', sd)
    with pytest.raises(FileNotFoundError): read_edit(tmp_path/'none.safetensors', sd)
    with pytest.raises(ValueError, match='pickles'): save_edit(edit, tmp_path/'x.pt')
    strange = replace(edit, sentence='')                                   # without a sentence nothing is compared
    assert read_edit(save_edit(strange, file), sd).sentence==''

# ---------------------------------------------------------------- which way when

def test_what_is_put_on_for_drawing_is_taken_off(tmp_path):
    from sdlearn.adapt.which import Taught, draw_taught, untaught
    from sdlearn.pipeline import txt2img
    sd, on = imagic_sd(tmp_path), []
    def put(sd):
        on.append('on')
        return lambda: on.append('off')
    taught = Taught('a dog', put, None, 0, 0.)
    kw = dict(num_inference_steps=2)
    drawn = draw_taught(sd, taught, ['{} in the snow']*9+['a cat'], 7, **kw)
    assert len(drawn)==10 and on==['on', 'off']
    for i, said in ((0, 'a dog in the snow'), (8, 'a dog in the snow'), (9, 'a cat')):   # each has its own seed
        [want] = txt2img(sd, said, seed=7+i, progress=False, **kw)
        assert (images_to_tensor_of(drawn[i])-images_to_tensor_of(want)).abs().max()<.03
    with pytest.raises(ValueError): draw_taught(sd, taught, ['{}'], -1, **kw)
    assert on==['on', 'off']*2 and untaught.put(sd)() is None

def images_to_tensor_of(im):
    from sdlearn.core import images_to_tensor
    return images_to_tensor(im)

def test_five_ways_leave_the_checkpoint_alone_and_count_right(tmp_path, monkeypatch):
    import sdlearn.adapt.which as which
    from PIL import Image
    from safetensors.torch import load_file
    from sdlearn.adapt.imagic import read_edit
    from sdlearn.adapt.inversion import read_words
    from sdlearn.adapt.lora import read_lora
    sd, kw = imagic_sd(tmp_path), dict(progress=False)
    side = sd.unet.config.sample_size*8
    pictures = [Image.effect_noise((side, side), 90).convert('RGB') for _ in range(2)]
    bits = weights_of(dict(unet=sd.unet, text=sd.text_encoder))
    both, captions = which.mirrored(pictures, 'a dog')
    assert both[:2]==pictures and both[2]==pictures[0].transpose(0) and len(both)==4
    assert captions==['a picture of a dog on a white background']*2+['a picture of a dog']*2
    ways = dict(word=which.teach_word(sd, pictures, 'dog', steps=1, **kw), lora=which.teach_lora(sd, pictures, 'orca', 1, rank=2, **kw),
                booth=which.teach_dreambooth(sd, pictures, 'deer', steps=1, n=1, rank=3, **kw), tuned=which.teach_all(sd, pictures, 'owl', 1, **kw))
    ways['edit'], edit = which.teach_edit(sd, pictures[0], 'a dog in the snow', 'dog', steps=(1, 1), rank=2, **kw)
    assert [w.call for w in ways.values()]==['a <it>', 'an orca', 'a sks deer', 'an owl', 'a dog']
    assert same_bits(weights_of(dict(unet=sd.unet, text=sd.text_encoder)), bits)
    low = ways['lora'].numbers
    assert ways['booth'].numbers==1.5*low and ways['tuned'].numbers==sum(p.numel() for p in sd.unet.parameters())
    assert ways['word'].numbers==edit.found.shape[-1] and ways['edit'].numbers==low+edit.found.numel()
    words = len(sd.tokenizer)
    for name, taught in ways.items():
        undo = taught.put(sd)
        changed = not same_bits(weights_of(dict(unet=sd.unet)), {k: v for k, v in bits.items() if k.startswith('unet')})
        assert changed!=(name=='word') and len(sd.tokenizer)==words+(name=='word')
        undo()
        assert len(sd.tokenizer)==words and same_bits(weights_of(dict(unet=sd.unet, text=sd.text_encoder)), bits)
        assert taught.seconds>0 and taught.save(tmp_path/f'{name}.safetensors').is_file()
    assert [*read_words(tmp_path/'word.safetensors')]==['<it>']
    assert len(read_lora(tmp_path/'booth.safetensors', sd.unet))==len(read_lora(tmp_path/'lora.safetensors', sd.unet))
    undo = ways['tuned'].put(sd)
    assert all(torch.equal(v, sd.unet.state_dict()[k]) for k, v in load_file(tmp_path/'tuned.safetensors').items())
    undo()
    assert torch.equal(read_edit(tmp_path/'edit.safetensors', sd).found, edit.found)

def test_the_nearest_of_all_references_decides(monkeypatch):
    import sdlearn.adapt.which as which
    monkeypatch.setattr(which, 'seen', lambda x: dict(encoder=torch.tensor(x), pixels=-torch.tensor(x).flip(0)))
    mine, others = dict(encoder=torch.tensor([[0.], [4.]]), pixels=torch.tensor([[0.]])), dict(encoder=torch.tensor([[2.], [3.]]), pixels=torch.tensor([[-3.]]))
    right = which.nearer([[.5], [1.9], [4.5]], mine, others)
    assert right['encoder'].tolist()==[True, False, True] and right['pixels'].tolist()==[False, False, True]

def test_what_it_is_like_gets_as_many_chances(monkeypatch):
    import sdlearn.adapt.which as which
    monkeypatch.setattr(which, 'renderings', lambda name, n: [name]*n)
    monkeypatch.setattr(which, 'seen', lambda x: dict(encoder=torch.full((len(x), 2), float(len(x[0]))), pixels=torch.zeros(len(x), 5)))
    known = dict(encoder=torch.zeros(7, 2), pixels=torch.ones(7, 5))
    mine, others = which.references('orca', 'whale', known)
    assert mine['encoder'].tolist()==[[4., 4.]]*32 and others['encoder'].tolist()==[[5., 5.]]*32+[[0., 0.]]*7
    assert mine['pixels'].shape==(32, 5) and others['pixels'].sum()==35
    asked = []
    monkeypatch.setattr(which, 'seen', lambda x: asked.append(len(x)) or x)
    assert len(which.seen_known(2))==len(which.subjects())*2==asked[0]

def test_wishes_are_judged_by_their_own_pictures():
    from sdlearn.adapt.which import is_still_it, is_there, renderings, wishes
    from sdlearn.pocket.scenes import render
    asked = [*wishes]
    drawn = {name: [render(name, seed=77+i, **wishes[s])[0] for i, s in enumerate(asked)] for name in ('orca', 'whale')}
    for judge, right in is_there(drawn['orca'], 'orca', asked).items(): assert right.sum()>=3, judge
    for judge, right in is_there(drawn['orca'], 'orca', asked[1:]+asked[:1]).items(): assert not right.any(), judge
    assert is_still_it(drawn['orca'], 'orca', 'whale', asked)['encoder'].all()
    assert not is_still_it(drawn['whale'], 'orca', 'whale', asked)['encoder'].any()
    assert [im.tobytes() for im in renderings('orca', 2, 50)]==[render('orca', seed=i)[0].tobytes() for i in (50, 51)]

def test_a_study_goes_on_where_it_stopped_and_sums_up(tmp_path, monkeypatch):
    import sdlearn.adapt.which as which
    from PIL import Image
    done = []
    def one(sd, name, seed, known):
        done.append((name, seed))
        if len(done)==3: raise KeyboardInterrupt
        judged = dict(encoder=1+seed, pixels=4, both=seed)
        return dict(before=dict(it=judged), word=dict(it=judged, wish=judged, drift=dict(encoder=.5*seed, pixels=1.), seconds=1.)), [Image.new('RGB', (8, 8))]*2
    for name, fake in dict(study_one=one, seen_known=lambda: 1, load_sd=lambda networks: 2).items(): monkeypatch.setattr(which, name, fake)
    with pytest.raises(KeyboardInterrupt): which.study(tmp_path/'a', (0, 1), ('moose', 'orca'))
    assert [*which.read_study(tmp_path/'a')]==['moose-0', 'orca-0']
    rows = which.study(tmp_path/'a', (0, 1), ('moose', 'orca'))
    assert done==[('moose', 0), ('orca', 0), ('moose', 1), ('moose', 1), ('orca', 1)] and len(rows)==4
    table = which.summary(rows)
    assert table['word']==dict(it=dict(encoder=6/16, pixels=1., both=2/16), wish=dict(encoder=6/16, pixels=1., both=2/16),
                               drift=dict(encoder=.25, pixels=1.), n=4)
    assert table['before']==dict(it=dict(encoder=6/16, pixels=1., both=2/16), n=4)
    assert which._counts(dict(encoder=torch.tensor([1, 1, 0, 0])>0, pixels=torch.tensor([0, 1, 1, 1])>0))==dict(encoder=2, pixels=3, both=1)
    monkeypatch.setattr(which, 'study_ways', dict(word=dict(steps=1)))
    with pytest.raises(ValueError, match='another in'): which.read_study(tmp_path/'a')

# ---------------------------------------------------------------- inversion

@pytest.fixture(scope='module')
def bundles():
    from sdlearn.load import load_sd
    return {kind: load_sd(networks=kind) for kind in ('own', 'diffusers')}

def word_table(sd):
    from sdlearn.text import text_core
    return text_core(sd.text_encoder).embeddings.token_embedding

def table_size_said(sd):
    config = sd.text_encoder.config
    return config['vocab_size'] if isinstance(config, dict) else config.vocab_size

def some_words():
    g = torch.Generator().manual_seed(0)
    return {'<tiny>': torch.randn(3, 128, generator=g)*.2, '<lines>': torch.randn(1, 128, generator=g)*.2}

def test_tokens_of_one_word_belong_together():
    from sdlearn.tokenizer import vectors_of
    assert vectors_of(['<a>', '<a>_1', '<a>_2', '<b>', 'x_7'])=={'<a>': 3, '<b>': 1, 'x_7': 1}

@pytest.mark.parametrize('kind', ['own', 'diffusers'])
def test_a_word_of_several_vectors_is_written_once(bundles, kind):
    from sdlearn.adapt.inversion import new_words, with_words
    from sdlearn.tokenizer import all_ids, token_weights, tokenize, word_ends
    before = bundles[kind].tokenizer
    more = with_words(with_words(before, ['<tiny>', '<tiny>_1', '<tiny>_2']), ['<lines>'])
    assert len(before)==49408 and len(more)==49412 and type(more).__name__==type(before).__name__
    assert [*new_words(more)]==['<tiny>', '<tiny>_1', '<tiny>_2', '<lines>'] and new_words(before)=={}
    a, three, snow = 320, [49408, 49409, 49410], 2583
    assert all_ids(more, 'a <TINY>, snow <lines>')[1:-1]==[a, *three, 267, snow, 49411]
    assert all_ids(more, 'a <tiny> <tiny>_1 <tiny>_2 snow')[1:-1]==[a, *three, snow]    # already spread
    assert all_ids(more, '<tiny>_2 <tiny>')[1:-1]==[49410, *three]
    assert tokenize(more, ['a <tiny>', 'snow'])[:, :6].tolist()==[[49406, a, *three, 49407], [49406, snow]+[49407]*4]
    assert word_ends(more, all_ids(more, 'a <tiny> snow'))==[1, 2, 3, 4, 5, 6, 7]
    weights = token_weights(more, 'a (<tiny>:1.5) in (snow:.5)')
    assert weights[:9].tolist()==[1, 1, 1.5, 1.5, 1.5, 1, .5, 1, 1]
    assert more.convert_ids_to_tokens([49409, 49411])==['<tiny>_1', '<lines>']

def test_rows_beyond_the_table_mean_what_they_are_given(bundles):
    from sdlearn.adapt.inversion import with_words, word_embeds, word_states
    from sdlearn.text import embed_prompts
    from sdlearn.tokenizer import tokenize, word_id
    for sd in bundles.values():
        known = [word_table(sd).weight[word_id(sd.tokenizer, w)] for w in ('deer', 'fox')]
        rows = torch.stack(known).clone().requires_grad_(True)
        ids = tokenize(with_words(sd.tokenizer, ['<x>', '<y>']), 'a <y> and a <x>')
        assert torch.equal(word_states(sd.text_encoder, ids, rows),
                           embed_prompts(sd.tokenizer, sd.text_encoder, 'a fox and a deer'))
        word_embeds(sd.text_encoder, ids, rows).sum().backward()
        assert torch.equal(rows.grad, torch.ones(2, 128))
        for bad in (ids.clamp(max=49407), ids+1):           # a word that is in the table already; none of ours
            with pytest.raises(ValueError, match='ids of new words'): word_embeds(sd.text_encoder, bad, rows)

@pytest.mark.parametrize('kind', ['own', 'diffusers'])
def test_words_are_put_in_and_taken_out(bundles, kind, tmp_path):
    from sdlearn.adapt.inversion import read_words, save_word
    from sdlearn.text import embed_prompts
    sd, words = bundles[kind], some_words()
    tokenizer, table = sd.tokenizer, word_table(sd).weight.clone()
    for i, (token, rows) in enumerate(words.items()):
        sd.load_word(save_word(tmp_path/f'{i}.safetensors', token, rows))
    assert sd.load_word(save_word(tmp_path/'2.safetensors', '<tiny>', words['<tiny>']), '<huge>') is sd
    assert len(sd.tokenizer)==len(word_table(sd).weight)==word_table(sd).num_embeddings==49415
    assert torch.equal(word_table(sd).weight, torch.cat([table, *words.values(), words['<tiny>']]))
    assert table_size_said(sd)==49415
    both = embed_prompts(sd.tokenizer, sd.text_encoder, ['a <tiny> here', 'a <huge> here'])
    assert torch.equal(*both) and not word_table(sd).weight.requires_grad
    with pytest.raises(ValueError, match='knows already'): sd.load_word(tmp_path/'0.safetensors')
    assert len(sd.tokenizer)==49415                         # nothing half done
    sd.unload()
    assert sd.tokenizer is tokenizer and torch.equal(word_table(sd).weight, table)
    assert table_size_said(sd)==49408

@pytest.mark.parametrize('kind', ['own', 'diffusers'])
def test_a_checkpoint_is_saved_with_its_words(bundles, kind, tmp_path):
    from diffusers import StableDiffusionPipeline
    from sdlearn.adapt.inversion import add_words
    from sdlearn.load import load_sd
    from sdlearn.text import embed_prompts
    sd, prompt = bundles[kind], 'a <tiny> in the style of <lines>'
    out = add_words(sd, some_words())
    said = embed_prompts(sd.tokenizer, sd.text_encoder, prompt)
    sd.save(tmp_path/'mine')
    out()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path/'mine')
    assert_close(pipe.encode_prompt(prompt, 'cpu', 1, False)[0], said, rtol=1e-5, atol=2e-5)
    pipe.save_pretrained(tmp_path/'theirs')
    for folder in ('mine', 'theirs'):
        for networks in ('own', 'diffusers'):
            again = load_sd(tmp_path/folder, networks=networks)
            assert_close(embed_prompts(again.tokenizer, again.text_encoder, prompt), said, rtol=1e-5, atol=2e-5)
    again.save(tmp_path/'again')
    assert len(load_sd(tmp_path/'again', networks='own').tokenizer)==49412

def test_files_of_words(tmp_path):
    from safetensors.torch import save_file
    from sdlearn.adapt.inversion import read_words, save_word
    words = some_words()
    for token, rows in words.items():
        file = save_word(tmp_path/'new'/'learned_embeds.safetensors', token, rows)
        assert torch.equal(read_words(file)[token], rows) and [*read_words(file.parent, '<b>')]==['<b>']
    save_file(dict(emb_params=words['<tiny>'].half()), tmp_path/'My-Bear.safetensors')      # AUTOMATIC1111
    assert torch.equal(read_words(tmp_path/'My-Bear.safetensors')['my-bear'], words['<tiny>'].half())
    save_file({'<Tiny>': words['<tiny>'][0]}, tmp_path/'one.safetensors')                   # diffusers
    assert torch.equal(read_words(tmp_path/'one.safetensors')['<tiny>'], words['<tiny>'][:1])
    save_file(words, tmp_path/'two.safetensors')
    assert {*read_words(tmp_path/'two.safetensors')}=={*words}
    with pytest.raises(ValueError, match='one word'): read_words(tmp_path/'two.safetensors', '<b>')
    save_file({'unet.x.lora_down.weight': torch.zeros(2, 3, 4, 5)}, tmp_path/'l.safetensors')
    with pytest.raises(ValueError, match='sd.load_lora'): read_words(tmp_path/'l.safetensors')
    save_file(dict(clip_l=torch.zeros(1, 768), clip_g=torch.zeros(1, 1280)), tmp_path/'xl.safetensors')
    with pytest.raises(ValueError, match='SDXL'): read_words(tmp_path/'xl.safetensors')
    torch.save(words, tmp_path/'w.pt')
    with pytest.raises(ValueError, match='pickles.*save its tensors'): read_words(tmp_path/'w.pt')
    (tmp_path/'w.pt').rename(tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match='damaged'): read_words(tmp_path/'w.safetensors')
    with pytest.raises(FileNotFoundError, match='expected a file'): read_words(tmp_path/'no.safetensors')
    with pytest.raises(ValueError, match='.safetensors'): save_word(tmp_path/'w.pt', '<b>', words['<lines>'])

@pytest.mark.parametrize('rows,said', [(torch.zeros(2, 768), 'SD v1'), (torch.full((1, 128), float('nan')), 'NaN'),
                                       (torch.zeros(128), 'shape'), (torch.zeros(1, 128).long(), 'int64')])
def test_vectors_that_do_not_fit_are_refused(bundles, rows, said):
    from sdlearn.adapt.inversion import add_words
    with pytest.raises(ValueError, match=said): add_words(bundles['own'], {'<good>': torch.zeros(1, 128), '<x>': rows})
    assert len(bundles['own'].tokenizer)==len(word_table(bundles['own']).weight)==49408

@pytest.mark.parametrize('token', ['cat', 'Tiny', '', 'my bear', '(x:1.2)', '<|endoftext|>', '<x>_1', None, ' <x>'])
def test_names_that_a_word_cannot_have(bundles, token):
    from sdlearn.adapt.inversion import check_token
    for sd in bundles.values():
        with pytest.raises(ValueError, match='expected a new word'): check_token(sd.tokenizer, token)

def test_a_word_is_learned_and_only_it(bundles, tmp_path):
    import numpy as np
    from PIL import Image
    from sdlearn.adapt.inversion import learn_word, moved, start_rows
    sd = bundles['own']
    bits = {k: v.clone() for net in (sd.text_encoder, sd.unet, sd.vae) for k, v in net.state_dict().items()}
    grey = Image.fromarray(np.full((90, 140), 200, np.uint8))
    ims = [grey, Image.new('RGBA', (33, 300), (0, 0, 255, 90)), Image.new('P', (128, 128))]
    def learn(steps=4, **how): return learn_word(sd, ims, '<x>', 'fox', batch=2, progress=False, **dict(steps=steps)|how)
    rows, losses = learn()
    start = start_rows(sd, 'fox')
    assert rows.shape==(1, 128) and len(losses)==4 and .01<moved(rows, start)<.2 and not rows.requires_grad
    assert all(torch.equal(v, bits[k]) for net in (sd.text_encoder, sd.unet, sd.vae) for k, v in net.state_dict().items())
    with pytest.warns(UserWarning, match='99.5%'): learn(lr=1e-6)
    def level(steps, **how): return learn(steps, decay=False, **how)
    level(2, path=tmp_path/'s')
    for a, b in zip(level(4, path=tmp_path/'s'), level(4)): assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert not torch.equal(level(4)[0], rows)               # the rate falls to nothing, unless told otherwise
    two, _ = learn(vectors=2)
    assert two.shape==(2, 128) and not torch.equal(*two)
    told, _ = learn(captions=['a red {}', 'a {}', '{}'])
    assert not torch.equal(told, rows)
    theirs, _ = learn_word(bundles['diffusers'], ims, '<x>', 'fox', batch=2, progress=False, steps=4)
    assert_close(theirs, rows, rtol=1e-3, atol=1e-4)

def test_timesteps_spread_over_a_batch():
    from dataclasses import replace
    from sdlearn.adapt.inversion import spread_timesteps
    from sdlearn.schedule import SD_V1
    def some(n, seed, **how): return spread_timesteps(n, torch.Generator().manual_seed(seed), **how)
    assert torch.equal(some(4, 1), some(4, 1)) and not torch.equal(some(4, 1), some(4, 2)) and some(4, 1).dtype==torch.int64
    for low in (0, 400):
        many = torch.stack([some(4, seed, lowest=low/1000) for seed in range(2000)])
        each = (1000-low)//4
        assert ((many-low)//each==torch.arange(4)).all()    # each in its own quarter
        assert (many.float().mean(0)-low-torch.arange(4)*each-each/2).abs().max()<8 and many.min()<=low+2 and many.max()>=997
    assert len(some(1000, 0, lowest=0.).unique())==1000 and some(1, 0).shape==(1,) and some(64, 0).min()>=400
    short = some(4, 1, schedule=replace(SD_V1, num_train_timesteps=100))
    assert ((short-40)//15==torch.arange(4)).all()

def test_what_is_no_lesson_for_a_word(bundles):
    from PIL import Image
    from sdlearn.adapt.inversion import learn_word
    sd, im = bundles['own'], Image.new('RGB', (128, 128), 'red')
    def learn(pictures=(im, im), token='<x>', start='fox', **how):
        return learn_word(sd, pictures, token, start, steps=1, batch=1, progress=False, **how)
    for pictures in ([], (), None, im):
        with pytest.raises(ValueError, match='three to five'): learn(pictures)
    with pytest.raises(ValueError, match='Image.open'): learn(['a.png'])
    with pytest.raises(ValueError, match='knows already'): learn(token='cat')
    with pytest.raises(ValueError, match='one token'): learn(start='xylophonist')
    with pytest.raises(ValueError, match='all zeros'): learn(start='person')
    for n in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match='vectors'): learn(vectors=n)
    for captions in (['a {}'], ['a {}', 'a fox'], 'a {}'):
        with pytest.raises(ValueError, match='caption'): learn(captions=captions)
    with pytest.warns(UserWarning, match='one picture'): learn([im])
    with pytest.raises(FloatingPointError, match='smaller learning rate'):
        old = sd.unet.conv_out.bias.clone()
        sd.unet.conv_out.bias.fill_(float('nan'))
        try: learn()
        finally: sd.unet.conv_out.bias.copy_(old)

def test_a_words_loss_is_the_noise_loss_of_its_caption(bundles):
    "By hand: one picture, one caption, the word at its place"
    from sdlearn.adapt.inversion import Word, start_rows, with_words, word_loss
    from sdlearn.denoiser import noise_loss
    from sdlearn.schedule import sigma_at
    from sdlearn.text import embed_prompts
    from sdlearn.tokenizer import tokenize
    from sdlearn.unet import predict_noise
    sd, g = bundles['own'], torch.Generator().manual_seed(1)
    x0 = torch.randn(2, 4, 16, 16, generator=g)
    tokenizer = with_words(sd.tokenizer, ['<x>'])
    ids = torch.stack([tokenize(tokenizer, [c]) for c in ('a picture of a <x>', 'a <x> in the snow')])
    got = word_loss(sd, x0, ids, 3)(Word(start_rows(sd, 'fox')), torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    i, _ = (torch.randint(n, (3,), generator=g) for n in (2, 1))
    t = (400+200*(torch.arange(3)+torch.rand(3, generator=g))).long()
    words = embed_prompts(sd.tokenizer, sd.text_encoder, ['a picture of a fox', 'a fox in the snow'])[i]
    noise = torch.randn(3, 4, 16, 16, generator=g)
    predict = lambda x, sigma, cond: predict_noise(sd.unet, x, t, cond)
    assert_close(got, noise_loss(predict, x0[i], words, sigma_at(t), noise))

# hostile: the most telling of .ci/hostile, which asks every door with everything

def test_numbers_of_rarer_kinds_and_what_only_looks_like_one():
    import numpy as np
    from decimal import Decimal
    from sdlearn.core import as_path, check_number, check_tensor, generator_of, real, whole
    from sdlearn.pipeline import _seeds, start_step
    for half in (Decimal('.5'), np.longdouble(.5), torch.tensor(.5, dtype=torch.bfloat16)): assert real(half)==.5
    for odd in (10**400, np.complex64(.5+1j), np.str_('.5'), np.datetime64('2020'), np.timedelta64(1, 's'), Decimal('nan')): assert real(odd) is None, odd
    assert check_number(np.int8(5), 'n', 1, 5, whole)==5 and check_number(1, 'n', 1, 5, whole)==1
    for odd in (0, 6, 2., True, '3', None):
        with pytest.raises(ValueError, match='expected n as a whole number from 1 to 5, got'): check_number(odd, 'n', 1, 5, whole)
    for odd in (b'7', {7: 1}, {7}, 'seven'):                                # a byte is a number, and nobody's seed
        with pytest.raises(ValueError, match='expected a seed'): generator_of(_seeds(odd, 1)[0])
    assert _seeds(np.array([5, 6]), 2)==_seeds(range(5, 7), 2)==_seeds(5, 2)==[5, 6]
    for steps, strength in ((10, -1), (10, 2), (10, '.5'), (2.5, .5), (True, .5)):
        with pytest.raises(ValueError, match='expected'): start_step(steps, strength)
    for odd in (None, 5, b'x', '', 'a\0b'):
        with pytest.raises(ValueError, match='expected a folder, got'): as_path(odd, 'a folder')
    x = torch.zeros(2, 4, 8, 8)
    assert check_tensor(x, 'x', '(B,4,h,w)') is x and check_tensor(x[0, 0, 0], 'x', '(...)').ndim==1
    for odd in (x[0], x[:, :3], x.long(), x.bool(), x.cfloat(), x.numpy(), None):
        with pytest.raises(ValueError, match=r'expected x of shape \(B,4,h,w\) and real numbers, got'): check_tensor(odd, 'x', '(B,4,h,w)')

def test_pictures_are_read_to_their_end_in_one_place(tmp_path):
    import io
    import numpy as np
    from PIL import Image
    from sdlearn.core import as_rgb
    from sdlearn.pipeline import as_mask
    im = Image.effect_noise((64, 64), 90).convert('RGB')
    im.save(tmp_path/'a.png')
    with Image.open(tmp_path/'a.png') as closed: pass
    half = Image.open(io.BytesIO((tmp_path/'a.png').read_bytes()[:2000]))
    for door in (as_rgb, as_mask):
        for odd in (closed, half):
            with pytest.raises(ValueError, match='to its end'): door(odd)
        for odd in (None, 'a.png', np.zeros((8, 8))):
            with pytest.raises(ValueError, match='expected a PIL image, got'): door(odd)
    deep = Image.fromarray(np.array([[7, 40000]], np.uint16))
    deep.info['transparency'] = 7                                           # a grey that stands for no colour
    assert [as_rgb(deep).getpixel((i, 0))[0] for i in (0, 1)]==[255, 156]
    assert as_rgb(Image.new('LA', (2, 2), (9, 0)).convert('La')).getpixel((0, 0))==(255, 255, 255)
    hole = np.zeros((16, 16), np.uint16)
    hole[3:5] = 1                                                           # 16 bits, of zeros and ones
    assert np.array_equal(np.asarray(as_mask(Image.fromarray(hole)))>0, hole>0)

def test_looking_at_attention_disturbs_nobody():
    import threading
    from sdlearn import load_sd
    from sdlearn.attention import attention_maps, attention_patterns
    from sdlearn.text import embed_prompts
    from sdlearn.tokenizer import tokenize
    sd = load_sd(networks='own')
    def look(i):
        words, x = ['a cat', 'a red dog', 'an owl'][i], torch.full((1, 4, 4, 4), float(i))
        return [attention_patterns(sd.text_encoder, tokenize(sd.tokenizer, words)),
                *attention_maps(sd.unet, x, 500, embed_prompts(sd.tokenizer, sd.text_encoder, words)).values()]
    alone, together = [look(i) for i in range(3)], [[] for _ in range(3)]
    def often(i): together[i] += [look(i) for _ in range(8)]
    threads = [threading.Thread(target=often, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    for expected, found in zip(alone, together):
        assert len(found)==8
        for tries in found: assert_close(tries, expected)
    for net in (sd.unet, sd.text_encoder):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

def changed(folder, name, text): # pocket, by links, with one file of other content
    from sdlearn.load import pocket_path
    for f in pocket_path().rglob('*'):
        to = folder/f.relative_to(pocket_path())
        to.parent.mkdir(parents=True, exist_ok=True)
        if f.is_file() and f.relative_to(pocket_path()).as_posix()!=name: os.symlink(f, to)
    (folder/name).write_text(text((pocket_path()/name).read_text(encoding='utf8')), encoding='utf8')
    return folder

def says(**kw): return lambda text: json.dumps(json.loads(text)|kw)

@pytest.mark.parametrize('name, text, words', [
    ('unet/config.json', says(norm_num_groups=7), '7 heads or groups'), ('unet/config.json', says(attention_head_dim=3), '3 heads or groups'),
    ('text_encoder/config.json', says(num_attention_heads=3), '3 heads or groups'), ('unet/config.json', says(layers_per_block=True), 'layers_per_block=True'),
    ('unet/config.json', says(sample_size='16'), "sample_size='16'"), ('unet/config.json', says(block_out_channels=[64, 128, 176.]), 'block_out_channels'),
    ('unet/config.json', says(layers_per_block=2), 'arrays differ, e.g.'), ('vae/config.json', says(scaling_factor=0), 'scaling_factor=0'),
    ('vae/config.json', says(scaling_factor=float('nan')), 'NaN is no number'), ('scheduler/scheduler_config.json', says(_guidance_scale='x'), "'x'"),
    ('scheduler/scheduler_config.json', says(set_alpha_to_one='yes'), "set_alpha_to_one='yes'"),
    ('tokenizer/vocab.json', says(**{'cat</w>': 1929}), 'different tokenizers'), ('tokenizer/vocab.json', says(**{'cat</w>': '2368'}), 'different tokenizers'),
    ('tokenizer/merges.txt', lambda text: text+'i n\n', 'different tokenizers'),
    ('tokenizer/tokenizer_config.json', says(added_tokens_decoder={'49408': dict(content='<new>')}), '49408 tokens'),
    ('tokenizer/tokenizer_config.json', says(added_tokens_decoder=5), 'something else in them')])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name, text, words):
    from sdlearn.load import load_sd
    with pytest.raises(ValueError, match=re.escape(words)) as e: load_sd(changed(tmp_path/'a', name, text), networks='own')
    assert 'expected' in str(e.value) and str(e.value).count('\n')==0

def test_a_checkpoint_that_does_not_say_its_side(tmp_path):
    from sdlearn.load import load_sd
    from sdlearn.pipeline import native_size
    for i, (side, pixels) in enumerate(((None, 512), ([16, 24], 192), (8, 64))):
        sd = load_sd(changed(tmp_path/str(i), 'unet/config.json', says(sample_size=side)), networks='own')
        assert native_size(sd)==pixels and f'{pixels} pixels' in repr(sd)

def test_a_wide_checkpoint_draws_wide(tmp_path):
    from sdlearn import load_sd, txt2img
    sd = load_sd(changed(tmp_path/'a', 'unet/config.json', says(sample_size=[2, 4])), networks='own')
    for asked, size in ((dict(), (32, 16)), (dict(height=24), (32, 24))):
        assert txt2img(sd, 'a fox', num_inference_steps=1, progress=False, **asked)[0].size==size

def test_a_half_said_schedule_is_refused():
    whole = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', _class_name='DDIMScheduler')
    read_schedule(whole)
    for k in ('beta_start', 'beta_end', 'beta_schedule'):
        with pytest.raises(ValueError, match=f'{k}=None'): read_schedule({n: v for n, v in whole.items() if n!=k})

@pytest.mark.parametrize('offset', [dict(steps_offset=0), {}])
def test_an_outdated_offset_is_read_as_diffusers_pipeline_reads_it(tmp_path, offset):
    import diffusers
    from sdlearn import load_sd, txt2img
    from sdlearn.core import seeded_noise
    name, said = 'scheduler/scheduler_config.json', dict(_class_name='DDIMScheduler', beta_start=.00085, beta_end=.012,
        beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False, **offset)
    folder = changed(tmp_path/'a', name, lambda text: json.dumps(said))
    index = json.loads((folder/'model_index.json').read_text(encoding='utf8'))|dict(scheduler=['diffusers', 'DDIMScheduler'])
    (folder/'model_index.json').unlink()        # a link
    (folder/'model_index.json').write_text(json.dumps(index), encoding='utf8')
    pipe, sd = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None), load_sd(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe('a fox', num_inference_steps=2, guidance_scale=4., latents=seeded_noise((4, 8, 8), [5]), height=64, width=64).images[0]
    ours = txt2img(sd, 'a fox', num_inference_steps=2, guidance_scale=4., seed=5, height=64, width=64, sampler='ddim', progress=False)[0]
    assert abs(np.asarray(ours).astype(int)-np.asarray(theirs)).max()<=2

def test_a_warm_up_that_is_not_drawn_is_told(tmp_path):
    from sdlearn import load_sd
    for i, said in enumerate((dict(skip_prk_steps=False), dict(skip_prk_steps=True))):
        folder = changed(tmp_path/str(i), 'scheduler/scheduler_config.json', says(_class_name='PNDMScheduler', **said))
        assert ('skip_prk_steps' in str(heard(lambda: load_sd(folder, networks='own'))))==(i==0)

def test_a_log_linear_scheduler_starts_late_where_its_own_does():
    import diffusers
    config = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', interpolation_type='log_linear')
    theirs = diffusers.EulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(5)
    plan, x0, z = make_plan(theirs, 5), torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    assert_close(plan.sigmas, theirs.sigmas[:6].tolist())
    theirs.set_begin_index(2)
    assert_close(plan.after(2).start(z, x0), theirs.add_noise(x0, z, theirs.timesteps[2:3]))

def test_schedulers_and_pipelines_that_do_not_fit_are_refused_in_words():
    import diffusers
    from sdlearn import load_sd, txt2img
    config = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False)
    for odd, said in ((diffusers.PNDMScheduler(**{k: v for k, v in config.items() if k!='clip_sample'}), 'skip_prk_steps=True'),
                      (diffusers.DDPMScheduler(**config, variance_type='learned_range'), "variance_type='learned_range'")):
        with pytest.raises(ValueError, match=said): make_plan(odd, 5)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(load_sd(networks='own').path, safety_checker=None)
    with pytest.raises(ValueError, match='expected what load_sd gives, got StableDiffusionPipeline'): txt2img(pipe, 'a fox')

@pytest.mark.parametrize('kind', [torch.float16, torch.float64])
def test_noise_levels_are_whatever_torchs_default(kind):
    from sdlearn import schedule
    right, other = schedule.sigmas_train(), Schedule(beta_end=.0121)
    torch.set_default_dtype(kind)
    try: assert torch.equal(schedule.sigmas_train(), right) and schedule.sigma_at(999, other)>0
    finally: torch.set_default_dtype(torch.float32)
    assert schedule.sigma_at(999, other)==schedule.sigmas_train(other)[-1].item()

def test_what_steps_and_asks_is_checked_at_the_door(tmp_path):
    from sdlearn import load_sd, txt2img
    sd = load_sd(networks='own')
    how = dict(num_inference_steps=2, seed=1, height=16, width=16, progress=False, sampler='euler')
    def nothing(x, sigma, t): return 0*x
    for odd in (0, '', [], 'euler'):
        with pytest.raises(ValueError, match='expected an eps_fn'): txt2img(sd, eps_fn=odd, **how)
        if odd!='euler':
            with pytest.raises(ValueError, match='expected an on_step'): txt2img(sd, 'a cat', on_step=odd, **how)
    for odd in (torch.zeros(1, 4, 2, 2, dtype=torch.long), torch.zeros(1, 4, 2, 2, dtype=torch.cfloat), torch.zeros(1, 4, 2, 2)>0):
        with pytest.raises(ValueError, match='expected eps_fn to return'): txt2img(sd, eps_fn=lambda x, sigma, t: odd, **how)
    for odd in (None, 5., torch.zeros(1, 2, 2, 2), torch.zeros(2, 4, 2, 2)):
        def steer(step): step.x_next = odd
        with pytest.raises(ValueError, match='expected step.x_next'): txt2img(sd, eps_fn=nothing, on_step=steer, **how)
    with pytest.raises(ValueError, match='negative prompt'): txt2img(sd, 'a cat', 5, guidance_scale=1, **how)
    with pytest.raises(ValueError, match='guidance_scale'): txt2img(sd, 'a cat', guidance_scale=torch.tensor([1., 2.]), **how)
    plan = make_plan('euler', 4)
    for odd in (True, '1', 1.5, None, -1, 4):
        with pytest.raises(ValueError, match='from 0 to 3'): plan.after(odd)
    for odd in (torch.zeros(1, 4, 4, 4), torch.zeros(2, 4, 2, 2), torch.zeros(4, 2, 2), 5):
        with pytest.raises(ValueError, match='expected'): plan.start(torch.zeros(1, 4, 2, 2), odd)
    for odd in ({}, None, 'sd'):
        with pytest.raises(ValueError, match='expected a Schedule'): make_plan('euler', 4, odd)
    for dtype in ('float16', torch.int8, torch.complex64, None):
        with pytest.raises(ValueError, match='expected a dtype'): load_sd(dtype=dtype, networks='own')

def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    from sdlearn import load_sd
    sd = load_sd(networks='own')
    (tmp_path/'file').write_text('x')
    for to in (tmp_path/'file'/'x', tmp_path/('x'*300)):
        with pytest.raises(OSError, match='expected to be able to write'): sd.save(to)
    for to in (None, '', b'x', '\0'):
        with pytest.raises(ValueError, match='expected a folder, got'): sd.save(to)
    (tmp_path/'real').mkdir()
    os.symlink(tmp_path/'real', tmp_path/'link')
    assert load_sd(sd.save(tmp_path/'link'), networks='own').path==tmp_path/'real' and (tmp_path/'link').is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir())==['file', 'link', 'real']

def test_the_command_keeps_pictures_apart_from_the_film(tmp_path, monkeypatch, capsys):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from sdlearn.cli import main
    monkeypatch.chdir(tmp_path)
    small = ['--steps', '1', '--height', '16', '--width', '16']
    def refused(*args):
        assert main([*args])==1
        return capsys.readouterr().err
    assert 'another file for the film' in refused('a', *small, '--n', '2', '-o', 'q.webp', '--gif', 'q-1.webp')
    for option in ('--image', '--mask', '--gif', '--device', '--model', '--again', '-o'):
        assert "a name behind" in refused('a', *small, option, '')
    for said in (dict(seed='x'), dict(seed=True), dict(n='2'), dict(sampler=['euler']), dict(model=5), dict(image=[]), dict(guidance_scale=[1])):
        note = PngInfo()
        note.add_text('sdlearn', json.dumps(dict(prompt='a')|said))
        Image.new('RGB', (16, 16)).save('p.png', pnginfo=note)
        assert 'expected p.png to say what' in refused('--again', 'p.png', '-o', 'n.png')
    assert not (tmp_path/'n.png').exists()

def test_the_command_takes_care_of_what_is_there(tmp_path, monkeypatch, capsys):
    from PIL import Image
    from safetensors.torch import save_file
    from sdlearn import cli
    from sdlearn.adapt.inversion import save_word
    monkeypatch.chdir(tmp_path)
    (tmp_path/'in').mkdir()
    for name in ('a.png', 'b.png'): Image.new('RGB', (16, 16)).save(tmp_path/'in'/name)
    (tmp_path/'in'/'c.heic').write_bytes(b'no picture')
    monkeypatch.setattr(cli, '_load', lambda *args, **kw: 1/0)      # the checks come before
    def learn(*more): return cli.main(['learn', 'in', '--word', '<t>', '--from', 'teddy', *more])
    save_file(dict(w=torch.ones(1), v=torch.ones(1)), 'model.safetensors')
    for more, said in ((('-o', 'model.safetensors'), 'no model.safetensors here yet, which keeps v, w'), (('-o', ''), 'a name behind --output'),
                       (('--device', ''), 'a name behind --device'), (('-o', 'in'), '.safetensors file')):
        assert learn(*more)==1 and said in capsys.readouterr().err, said
    (tmp_path/'d.safetensors').mkdir()
    assert learn('-o', 'd.safetensors')==1 and 'got the folder' in capsys.readouterr().err
    assert cli.main(['learn', '', '--word', '<t>', '--from', 'teddy'])==1 and 'a name behind --folder' in capsys.readouterr().err
    save_word('t.safetensors', '<t>', torch.ones(1, 4))
    with pytest.raises(ZeroDivisionError): learn('-o', 't.safetensors')         # this very word
    assert '1 of 3 files' in (err := capsys.readouterr().err) and 'c.heic' in err
    assert learn()==1 and 'no t.safetensors here yet' in capsys.readouterr().err
    save_word('t.safetensors', '<u>', torch.ones(1, 4))
    assert learn('-o', 't.safetensors')==1 and 'which keeps <u>' in capsys.readouterr().err
    with pytest.raises(SystemExit): cli.main(['a', 'fox', 'in', 'the', 'snow'])
    assert 'in quotes: sdlearn "A picture' in capsys.readouterr().err

def test_the_command_draws_what_is_meant(tmp_path, monkeypatch, capsys):
    from PIL import Image
    from sdlearn import cli
    from sdlearn.adapt.inversion import save_word
    monkeypatch.chdir(tmp_path)
    small = ['--steps', '1', '--seed', '1']
    assert cli.main(['a fox', *small, '--n', '3', '--grid', '--height', '16', '--width', '16', '-o', 'g.png'])==0
    assert cli.main(['--again', 'g.png', '--n', '2', '-o', 'h.png'])==0
    assert Image.open('h.png').size==(32, 16) and not (tmp_path/'h-0.png').exists()
    Image.new('RGB', (300, 100)).save('wide.png')
    for asked, size in ((['--height', '32'], (96, 32)), (['--width', '48'], (48, 16)), (['--width', '48', '--height', '32'], (48, 32))):
        assert cli.main(['a fox', *small, '--image', 'wide.png', *asked, '-o', 'w.png'])==0 and Image.open('w.png').size==size
    save_word('t.safetensors', '<t>', torch.ones(1, 128))
    tiny = [*small, '--height', '16', '--width', '16', '--word', 't.safetensors', '-o', 't.png']
    capsys.readouterr()
    assert cli.main(['a fox', *tiny])==0 and '<t>, learned in t.safetensors, is in neither prompt' in capsys.readouterr().err
    for said in (['a <T>'], ['a fox', '--negative', '<t>']): assert cli.main([*said, *tiny])==0 and 'neither' not in capsys.readouterr().err
    assert cli.main(['a fox', '--model', 'pocket'])==1 and 'pocket comes without a name' in capsys.readouterr().err
    monkeypatch.setattr(cli, 'make_pictures', lambda args: open(tmp_path))
    assert cli.main(['a fox'])==1 and f"expected to be able to use '{tmp_path}', but: Is a directory" in capsys.readouterr().err

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='a disk that is always full')
@pytest.mark.parametrize('closed', [True, False])
def test_the_command_draws_though_nobody_reads_along(tmp_path, closed):
    reader, there = os.pipe()
    os.close(reader)
    out = there if closed else open('/dev/full', 'w')
    done = subprocess.run([sys.executable, '-m', 'sdlearn', 'a fox', '--n', '2', '--steps', '1', '--height', '16', '--width', '16', '-o', tmp_path/'a.png'],
                          stdout=out, stderr=subprocess.PIPE, env=os.environ|dict(PYTHONPATH=str(root)), encoding='utf8')
    assert done.returncode==0 and 'rror' not in done.stderr and len([*tmp_path.glob('a-*.png')])==2, done.stderr

@pytest.mark.skipif(os.name=='nt', reason='no such permissions there')
def test_weights_are_as_readable_as_other_files_or_said_not_to_be(tmp_path, monkeypatch):
    from sdlearn import folders
    file = folders.write_weights(tmp_path/'w.safetensors', dict(w=torch.ones(1)))
    (tmp_path/'other').write_text('')
    assert file.stat().st_mode==(tmp_path/'other').stat().st_mode
    def closed(path, *args): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(folders, 'open', closed, raising=False)
    with pytest.raises(OSError, match='able to read .*w.safetensors.*, but: Permission denied'): folders.read_arrays(file)

def test_a_word_whose_name_cannot_be_is_called_otherwise(tmp_path):
    from safetensors.torch import save_file
    from sdlearn import load_sd
    sd = load_sd(networks='own')
    for name in ('My Word', 'moose'):
        save_file(dict(emb_params=torch.ones(1, 128)), tmp_path/f'{name}.safetensors')
        with pytest.raises(ValueError, match=r'load_word\(file, token='): sd.load_word(tmp_path/f'{name}.safetensors')
    assert sd.load_word(tmp_path/'moose.safetensors', '<moose>').unload()

def test_what_would_be_repeated_to_fit_is_refused():
    from sdlearn.idea.autoencoder import kl, sample_latents, vae_loss
    from sdlearn.idea.contrast import contrastive_loss, difference_loss
    from sdlearn.idea.score import accuracy, energy_distance
    some, one = torch.randn(3, 8), torch.randn(1, 8)
    class Wide(torch.nn.Module):
        def encode(self, x): return x, x
        def decode(self, z): return z[:1]
    for wrong in (lambda: contrastive_loss(some, torch.randn(4, 8)), lambda: difference_loss(some, one), lambda: kl(some, one),
                  lambda: sample_latents(some, one), lambda: vae_loss(Wide(), some), lambda: accuracy(torch.nn.Identity(), some, torch.tensor([1])),
                  lambda: energy_distance(some, some[:, :5]), lambda: energy_distance(some[:0], some)):
        with pytest.raises(ValueError, match='expected'): wrong()

def test_scenes_and_answers_that_are_none_are_refused_in_words():
    from PIL import Image
    from sdlearn import load_sd
    from sdlearn.adapt.finetune import learn_look
    from sdlearn.judge import share
    from sdlearn.load import pocket_path
    from sdlearn.pocket.captions import caption
    from sdlearn.pocket.scenes import draw, is_held_out, render
    for fn in (draw, is_held_out, caption):
        with pytest.raises(ValueError, match="expected a Scene, got 'fox'"): fn('fox')
    with pytest.raises(ValueError, match="'with', which is a word of 'wearing' and of 'holding'"): render('fox', relation='with', other='top hat')
    for word in ('in', 'wearing', 'holding', 'on', 'beside'): render('fox', relation=word, other='top hat')
    with pytest.raises(ValueError, match='at least one answer'): share(['a'])
    with pytest.raises(ValueError, match='got the folder'): load_sd(networks='own').load_lora(pocket_path()/'fast')
    two = [Image.new('RGB', (8, 8))]*2, ['a', 'b']
    for more in (dict(own=None), dict(own=(None, None)), dict(own=([],))):
        with pytest.raises(ValueError, match='pictures and captions in two lists'): learn_look(None, *two, **more)
    with pytest.raises(ValueError, match='pictures and captions in two lists'): learn_look(None, None, ['a'])

def test_a_tokenizer_of_other_settings_is_refused_or_told(tmp_path):
    from sdlearn.tokenizer import Tokenizer
    name = 'tokenizer/tokenizer_config.json'
    for i, said in enumerate((dict(padding_side='left'), dict(truncation_side='left'), dict(model_max_length=20))):
        with pytest.raises(ValueError, match='='.join(f'{k}={v!r}' for k, v in said.items())):
            Tokenizer.from_folder(changed(tmp_path/str(i), name, says(**said))/'tokenizer')
    for i, (said, told) in enumerate(((dict(single_word=True), True), (dict(normalized=False), True), (dict(normalized=True), False))):
        folder = changed(tmp_path/f'w{i}', name, says(added_tokens_decoder={'49408': dict(content='<tiny>')|said}))
        assert ("'<tiny>' is found in capitals" in heard(lambda: Tokenizer.from_folder(folder/'tokenizer')))==told

def test_diffusers_own_infinity_is_read(tmp_path):
    from sdlearn.load import load_sd
    assert load_sd(changed(tmp_path/'a', 'scheduler/scheduler_config.json', says(lambda_min_clipped=-math.inf)), networks="own").guidance_scale==4

def test_the_model_and_the_true_pictures_are_not_mixed_up(monkeypatch):
    from types import SimpleNamespace
    from PIL import Image
    from sdlearn import pipeline
    from sdlearn.pocket import evaluate as rulers
    sd = SimpleNamespace(path=None)
    asked = []
    def nothing(sd, prompts, seed, progress, **kw):
        asked.append((len(prompts), seed, kw))
        return [Image.new('RGB', (128, 128)) for _ in prompts]
    monkeypatch.setattr(pipeline, 'txt2img', nothing)
    rows, images, right = rulers.evaluate_kind(sd, 'background', 10, held=True, guidance_scale=3)
    row = rows['background']
    assert row['n']==10==len(images)==len(right) and max(row['clip'], row['pixels'])<.4<.8<row['true_clip']
    assert asked==[(8, 0, dict(guidance_scale=3)), (2, 8, dict(guidance_scale=3))]
    varied, _ = rulers.evaluate_variety(sd, ['fox', 'otter'], seeds=2)
    assert varied['drawn']==varied['ratio']==0<varied['true']
    asked.clear()
    rows, _ = rulers.evaluate_guidance(sd, ['fox'], (0, 7.5), num_inference_steps=3)
    assert [a[2]['guidance_scale'] for a in asked]==[0, 7.5] and [*rows]==['0', '7.5']
    asked.clear()
    assert rulers.evaluate_steps(sd, ['fox'], (4, 10))['4']['rms']==0
    assert [a[2]['num_inference_steps'] for a in asked]==[50, 4, 10]

def test_a_fingerprint_is_the_same_in_a_cell_and_in_a_module():
    from sdlearn.train import fingerprint
    body = 'def loss(net, g): return torch.where(torch.rand(3, generator=g)<.5, 0, 1)+net(2)+net.f(g)[0].real.abs()'
    cell, module = dict(torch=torch), {}
    exec(compile(body, 'cell', 'exec'), cell)                      # names were imported in another cell
    exec(compile('import torch\n'+body, 'module', 'exec'), module)
    assert fingerprint(cell['loss'])==fingerprint(module['loss'])
    for other in (body.replace('<.5', '<.6'), body.replace('+net', '-net'), body.replace('rand(', 'randn('), body.replace('<.5', '>.5')):
        exec(compile('import torch\n'+other, 'module', 'exec'), module)
        assert fingerprint(cell['loss'])!=fingerprint(module['loss']), other

def test_a_page_is_written_over_no_other(tmp_path, monkeypatch):
    from sdlearn import page
    monkeypatch.setattr(page, 'page_settings', lambda *args: {})
    (tmp_path/'index.html').write_text('mine', encoding='utf8')
    with pytest.raises(ValueError, match='another index.html'): page.write_page(None, tmp_path, runtime=False)
    for f in page.web_path().iterdir(): shutil.copy(f, tmp_path)
    with pytest.raises(AttributeError): page.write_page(None, tmp_path, runtime=False)      # goes on to the networks

# ---------------------------------------------------------------- the idea, on digits

def test_digits_come_with_the_package():
    from sdlearn.idea.score import digits
    x, y, held, y_held = digits()
    assert x.shape==(4400, 1, 28, 28) and held.shape==(600, 1, 28, 28) and x.dtype==torch.float32
    every, label = torch.cat([x, held]), torch.cat([y, y_held])
    assert label.bincount().tolist()==[500]*10 and every.min()==-1 and every.max()==1
    ink = [round((every[label==c]>0).float().mean().item(), 4) for c in range(10)]
    assert ink[1]==min(ink) and ink[0]==max(ink), ink       # a one needs the least ink, a zero the most
    middle = every[:,0,12:16,12:16].mean((1, 2))
    assert middle[label==1].mean()>.2>-.5>middle[label==0].mean()  # a one has ink in its middle, a zero none
    ones = (every[label==1,0]+1).mean(0)
    centre = [(half*torch.arange(28)).sum()/half.sum() for half in (ones[:14], ones[14:])]
    assert centre[0]>centre[1]+1                            # not mirrored: a one leans to the right
    top, bottom = every[:,0,:14].mean((1, 2)), every[:,0,14:].mean((1, 2))
    assert (top>bottom)[label==7].float().mean()>.5 and (top<bottom)[label==6].float().mean()>.8

def test_a_noise_predictor_is_told_and_guided():
    from sdlearn.idea.classes import predictor
    from sdlearn.idea.noise import predict
    asked = []
    def net(x_in, sigma, told):
        asked.append((x_in, sigma, told))
        return x_in*0+told[:,3].view(-1, 1, 1, 1)           # 1 when told "a 3", else 0
    x = torch.randn(2, 1, 4, 4)
    assert predictor(net, [3, 1])(x, 2.)[:,0,0,0].tolist()==[1, 0]
    assert predictor(net, [3, 1], 2.5)(x, 2.)[:,0,0,0].tolist()==[2.5, 0] and predictor(net)(x, 2.).abs().sum()==0
    assert predictor(net, [3, 1], 0.)(x, 2.).abs().sum()==0
    for x_in, sigma, _ in asked:
        torch.testing.assert_close(x_in, x/5**.5)
        assert sigma.tolist()==[2, 2]
    assert len(asked)==6                                    # guidance alone asks twice
    predict(net, x, torch.tensor([1., 3.]), torch.zeros(2, 10))
    torch.testing.assert_close(asked[-1][0], x/torch.tensor([2., 10.]).sqrt().view(2, 1, 1, 1))

def test_a_class_that_explains_the_noise_is_read():
    from sdlearn.idea.classes import read_class
    pictures = torch.randn(3, 1, 4, 4)
    def net(x_in, sigma, told): # knows the picture of each class, and takes none for nothing
        s = sigma.view(-1, 1, 1, 1)
        return (x_in*(s**2+1).sqrt()-(0 if told is None else (told@pictures.flatten(1)).view(x_in.shape)))/s
    said = read_class(net, pictures, torch.Generator().manual_seed(0), (1., 2.), 3)
    assert said.argmax(1).tolist()==[0, 1, 2]
    by_hand = pictures.square().flatten(1).sum(1)*(1+1/4)/2  # told nothing, it is wrong by the picture over sigma
    torch.testing.assert_close(said.diagonal(), by_hand, rtol=1e-3, atol=1e-3)

def test_directions_of_samplers_by_hand():
    from sdlearn.idea.steps import adam, draw, geometric_sigmas, momentum
    a, b = torch.randn(2, 3)
    d = momentum(-.5)
    torch.testing.assert_close(torch.stack([d(a), d(b)]), torch.stack([a, 1.5*b-.5*a]))
    d = adam(.5, .5, 2.)
    torch.testing.assert_close(d(a), 2*a.sign(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d(b), 2*(.25*a+.5*b)/.75/((.25*a**2+.5*b**2)/.75).sqrt(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(geometric_sigmas(3, 4., 1.)), torch.tensor([4., 2., 1., 0.]))
    torch.testing.assert_close(draw(lambda x, sigma: 0*x+sigma, torch.tensor([10.]), [4., 1., 0.], lambda e: 2*e),
                               torch.tensor([10.-3*8-1*2]))

# ---------------------------------------------------------------- a new look

def test_icons_in_the_box_are_whole(tmp_path):
    import numpy as np
    from sdlearn.adapt.finetune import on_white, read_icons
    from sdlearn.pocket.atlas import folder
    icons = read_icons()
    names = [*icons]
    assert len(names)==64 and (names[0], names[16], names[-1])==('panda', 'tiger-face', 'horse')
    arrays = {n: np.asarray(im).astype(float) for n, im in icons.items()}
    assert all(a.shape==(128, 128, 3) and np.ptp(a, -1).max()==0 for a in arrays.values())
    assert all(a[:14].min()==a[:, :14].min()==a[114:].min()==a[:, 114:].min()==255 for a in arrays.values())
    flat = np.stack([*arrays.values()]).reshape(64, -1)
    assert all((np.abs(flat-f).mean(1)<8).sum()==1 for f in flat)
    horse = arrays['horse'][14:114, 14:114, 0]<128
    assert .25<horse.mean()<.5                        # the last one is there, and not beyond the sheet
    assert (folder/'icons.webp').stat().st_size<300_000 and 'icons.webp' in (root/'NOTICE').read_text(encoding='utf8')
    with pytest.raises(FileNotFoundError, match='expected icons.webp in .*Install'): read_icons(tmp_path)
    from PIL import Image
    small = np.asarray(on_white(Image.new('RGB', (7, 7), 'red'), side=20, share=.5))
    assert (small[5:15, 5:15]==(255, 0, 0)).all() and (small.sum((0, 1))==(400*255, 300*255, 300*255)).all()

def test_black_and_fat_are_counted():
    import numpy as np
    from PIL import Image
    from sdlearn.adapt.finetune import blackness, in_look, line_width
    def picture(*boxes):
        a = np.full((128, 128, 3), 255, np.uint8)
        for (y, x, h, w), color in boxes: a[y:y+h, x:x+w] = color
        return Image.fromarray(a)
    fat, thin, half = picture(((0, 0, 10, 40), 0)), picture(((9, 9, 2, 90), 0)), picture(((0, 0, 8, 20), 0), ((50, 50, 8, 60), (250, 60, 0)))
    grey, empty = picture(((5, 5, 20, 20), 120)), picture()
    assert_close(blackness([fat, thin, half, grey, empty]), torch.tensor([1., 1., .25, 0., 0.]))
    assert_close(line_width([fat, thin, half, grey, empty]), torch.tensor([2*400/100, 2*180/184, 2*160/56, 0., 0.]))
    assert in_look([fat, thin, half, grey, empty]).tolist()==[True, False, False, False, False]
    assert blackness([picture(((0, 0, 9, 9), (0, 0, 200)))]).item()==0           # dark blue is not black
    assert not in_look([Image.new("RGB", (128, 128)), picture(((0, 0, 100, 100), 0))]).any()   # no paper

def test_captions_are_the_nearest_sentences(monkeypatch):
    from sdlearn.adapt import finetune
    asked = []
    def scores(pictures, texts, path):
        asked.append((texts, path))
        return torch.tensor([[.1, .9, .2], [.5, .3, .4]])
    monkeypatch.setattr(finetune, 'scores', scores)
    assert finetune.name_pictures(['a', 'b'], iter(['fox', 'owl', 'shoes']), 'ink of {}!', 'there')==['owl', 'fox']
    assert asked==[(['ink of a fox!', 'ink of an owl!', 'ink of shoes!'], 'there')]
    with pytest.raises(ValueError, match='with {} in it'): finetune.name_pictures(['a'], ['fox'], 'ink')
    with pytest.raises(ValueError, match='got 1 pictures and 0 names'): finetune.name_pictures(['a'], [])

def test_a_look_is_learned_from_pairs_and_own_pictures_go_without_its_word(monkeypatch):
    from PIL import Image
    from sdlearn.adapt import finetune
    from sdlearn.load import load_sd
    sd, got = load_sd(networks='own'), {}
    def kept(*args, **kw): got.update(loss=args, rest=kw)
    monkeypatch.setattr(finetune, 'lora_loss', kept)
    monkeypatch.setattr(finetune, 'learn_lora', lambda unet, loss, steps, **kw: (unet is sd.unet, steps, kw))
    monkeypatch.setattr(finetune, 'embed_prompts', lambda tokenizer, encoder, said: said)
    colors = [Image.new('RGB', (200, 150), c) for c in ('red', 'blue', 'green')]*4
    said = [f'a picture of {i}' for i in range(12)]
    out = finetune.learn_look(sd, colors, said, 'zwx', ([colors[0]], ['a car']), 7, 3, lr=.1, rank=2)
    latents, words, bs, schedule = got['loss']
    assert out==(True, 7, dict(lr=.1, rank=2)) and bs==3 and schedule is sd.schedule
    assert words==[*(f'{s}, zwx' for s in said), 'a car']
    assert latents.shape==(13, 4, 16, 16) and torch.equal(latents[0], latents[-1])   # pictures keep their order
    assert_close(latents[9:12], latents[:3], atol=1e-4, rtol=1e-4) 
    assert (latents[0]-latents[1]).abs().mean()>.1
    assert finetune.learn_look(sd, colors, said)[2]==dict(rank=8)
    for bad, words in (((colors, said[:3]), 'each of 12 pictures, got 3'), ((colors, 'a fox'), "got 'a fox'"),
                       ((colors[:1], said[:1]), 'got 1'), ((['x.png']*12, said), 'Image.open'),
                       ((colors, said, 'zwx', (colors[:2], [])), 'each of 2 pictures, got 0')):
        with pytest.raises(ValueError, match=words): finetune.learn_look(sd, *bad)

def test_a_student_lands_where_its_teacher_passes():
    import types
    from sdlearn.fast.student import Made, between, landing_error, read_made
    from sdlearn.schedule import sigma_at
    plan = Made().plan()
    assert plan.timesteps==[999, 749, 499, 249] and plan.sigmas[-1]==0
    fine = between(plan, (4, 3, 3, 3))
    assert {*plan.timesteps}<{*fine.timesteps} and len(fine.timesteps)==13 and fine.timesteps[-1]==249-500/3
    assert fine.sigmas==[*map(sigma_at, fine.timesteps), 0.] and fine.start_std==plan.start_std
    with pytest.raises(ValueError, match='4 numbers'): between(plan, (4, 3))
    class Says(torch.nn.Module): # the same noise whatever it sees
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
            self.config = types.SimpleNamespace(in_channels=4, cross_attention_dim=3)
        def forward(self, x_in, t, words):
            assert t.tolist()==[749.]*2
            return torch.full_like(x_in, .5)
    s, s_next = sigma_at(749), sigma_at(499)
    paths = torch.randn(2, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = paths[:, 1]*(s**2+1)**.5+(s_next-s)*.5           # Euler's step
    paths[:, 2] = x/(s_next**2+1)**.5
    i, words = torch.tensor([1, 1]), torch.zeros(2, 77, 3)
    assert landing_error(Says(), paths, words, i, plan).max()<1e-10
    paths[:, 2] += .1
    torch.testing.assert_close(landing_error(Says(), paths, words, i, plan), torch.full((2,), .01), rtol=1e-3, atol=0)
    for odd in (None, {}, Made()._asdict()|dict(sampler='fast'), Made()._asdict()|dict(num_inference_steps=0)):
        with pytest.raises(ValueError): read_made(odd)

def test_a_student_is_drawn_with_in_no_other_way():
    import tempfile
    from sdlearn.load import load_sd
    from sdlearn.pipeline import plan_for
    sd = load_sd(networks='own', fast=True)
    assert (sd.num_inference_steps, sd.sampler, sd.guidance_scale, sd.folded)==(4, 'euler', 1., 4.)
    assert plan_for(sd).timesteps==[999, 749, 499, 249]
    for odd in (dict(num_inference_steps=8), dict(sampler='ddim'), dict(sampler='dpmpp_2m')):
        with pytest.raises(ValueError, match="4 steps of 'euler'"): plan_for(sd, **odd)
    from sdlearn.denoiser import noise_predictor
    with pytest.raises(ValueError, match='in this student'): noise_predictor(sd, torch.zeros(2, 77, 128), 4.)
    with tempfile.TemporaryDirectory() as d:
        again = load_sd(sd.save(Path(d)/'student'), networks='own')
        with pytest.raises(ValueError, match='student already'): load_sd(Path(d)/'student', networks='own', fast=True)
        plain = load_sd(networks='own').save(Path(d)/'plain')
        with pytest.raises(FileNotFoundError, match='Leave fast out'): load_sd(plain, networks='own', fast=True)
        moved, there = load_sd(plain, networks='own'), plain.rename(Path(d)/'elsewhere')
        with pytest.raises(ValueError, match='set sd.path'): moved.save(Path(d)/'b')
        moved.path = str(there)     # as the message says it
        assert moved.save(Path(d)/'b').is_dir()
    assert (again.num_inference_steps, again.sampler, again.folded, again.schedule)==(4, 'euler', 4., sd.schedule)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), sd.unet.parameters()))
# ---------------------------------------------------------------- consistency

class Shares(torch.nn.Module):
    "Predicts a share of what it sees as noise: `share(sigma)`; and adds what it is told"
    def __init__(self, share, schedule=None):
        super().__init__()
        from sdlearn.schedule import SD_V1
        self.share, self.schedule, self.one = share, schedule or SD_V1, torch.nn.Parameter(torch.ones(()))
    def said(self, x_in, t, told):
        from sdlearn.schedule import sigma_at, sigma_like
        return self.one*self.share(sigma_like(sigma_at(t, self.schedule), x_in))*x_in+told[:, :, None, None]

def ask_shares(net, x_in, t, told): return net.said(x_in, t, told)
def exact_share(s): return s/(s**2+1)**.5                    # pictures of std 1
def settled_share(s): return ((s**2+1)**.5-1)/s              # x - sigma*eps is x_in: constant along their paths

def test_the_lower_end_of_a_path_is_the_picture_itself():
    from diffusers import LCMScheduler
    from sdlearn.fast.consistency import answer, boundary
    from sdlearn.schedule import scale_input, sigma_at
    theirs = LCMScheduler()
    for t in (0, 1, 19, 999): assert boundary(t)==pytest.approx(theirs.get_scalings_for_boundary_condition_discrete(t), abs=1e-12)
    x, eps = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert_close(answer(x, eps, sigma_at(0), 0), scale_input(x, sigma_at(0)))
    c_skip, c_out = boundary(torch.tensor([0, 1]))
    both = answer(x, eps, sigma_at(torch.tensor([0, 1])), torch.tensor([0, 1]))
    assert_close(both[1:], c_skip[1]*scale_input(x[1:], sigma_at(1))+c_out[1]*(x[1:]-sigma_at(1)*eps[1:]))

def test_the_boundary_is_written_once(monkeypatch):
    from sdlearn.fast import consistency
    monkeypatch.setattr(consistency, 'TIMESTEP_SCALING', 0.)             # everything is held: f(x, t) is x_in everywhere
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    step = next(consistency.lcm(lambda x, s, t: 7*x, x, [2., 0.], [500.]))
    assert_close(step.x_next, x/5**.5)                                   # the sampler obeys
    loss = consistency.consistency_loss(lambda g: (x, torch.zeros(2, 1)), Shares(exact_share), 1., 1000, ask=ask_shares)
    assert loss(Shares(lambda s: 0*s+7.), torch.Generator().manual_seed(0))<.05    # and so does the loss
    assert consistency.consistency_loss.__code__.co_consts.count(10.)==0

@pytest.mark.parametrize('end', (.012, .02))
def test_consistency_is_zero_for_the_settled_function_alone(end):
    from sdlearn.fast.consistency import consistency_loss
    from sdlearn.schedule import Schedule
    schedule = Schedule(beta_end=end)                                    # of teacher and student
    def draw(g): return torch.randn(64, 1, 8, 8, generator=g), torch.zeros(128, 1)
    def loss(share, original, **how):
        teacher, student = Shares(exact_share, schedule), Shares(share, schedule)
        fn = consistency_loss(draw, teacher, 1., original, schedule, ask_shares, **how)
        return fn(student, torch.Generator().manual_seed(0)).item()
    found = [loss(settled_share, n) for n in (10, 50, 1000)]
    assert found[0]>found[1]>found[2] and found[2]<.01
    assert all(loss(exact_share, n)>3*f for n, f in zip((10, 50, 1000), found))
    assert loss(settled_share, 1000, decay=0.)<.01

@pytest.mark.parametrize('end', (.012, .02))
def test_the_target_has_the_guidance_in_it(end):
    from sdlearn.denoiser import predicted_noise
    from sdlearn.fast.consistency import answer, consistency_loss, pseudo_huber
    from sdlearn.guidance import cfg
    from sdlearn.schedule import Schedule, add_noise, sigma_at, sigma_like
    r, schedule = torch.Generator().manual_seed(1), Schedule(beta_end=end)
    x0, told = torch.randn(3, 1, 4, 4, generator=r), torch.tensor([[.1]]*3+[[.4]]*3)
    teacher, student = Shares(exact_share, schedule), Shares(lambda s: .5*exact_share(s), schedule)
    for scale in (1., 4.):
        g = torch.Generator().manual_seed(0)
        k = torch.randint(10, (3,), generator=g)
        stops = torch.tensor([*range(999, 0, -100), 0])
        t, t_next = stops[k], stops[k+1]
        s, s_next = (sigma_like(sigma_at(v, schedule), x0) for v in (t, t_next))
        upper = add_noise(x0, torch.randn(x0.shape, generator=g), sigma_at(t, schedule))
        x_in = upper/(s**2+1)**.5
        eps = cfg(exact_share(s)*x_in+.1, exact_share(s)*x_in+.4, scale)
        lower = upper+(s_next-s)*eps
        def f(x, t):
            s = sigma_at(t, schedule)
            return answer(x, predicted_noise(student, x, s, t, told[3:], ask=ask_shares), s, t)
        wanted = pseudo_huber(f(upper, t), f(lower, t_next))
        fn = consistency_loss(lambda g: (x0, told), teacher, scale, 10, schedule, ask_shares)
        got = fn(student, torch.Generator().manual_seed(0))
        assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        got.backward()
        assert student.one.grad.abs()>0 and teacher.one.grad is None
    with pytest.raises(ValueError, match='two halves of 3'):
        consistency_loss(lambda g: (x0, told[3:]), teacher, 2., 10, ask=ask_shares)(student, g)

def test_the_distance_is_a_square_near_zero_and_a_length_far_away():
    from sdlearn.fast.consistency import pseudo_huber
    c = .00054*4**.5
    a = torch.tensor([[c, 0., 0., 0.], [0., 3., 0., 4.]])
    assert_close(pseudo_huber(a[:1], 0*a[:1]), torch.tensor(c*(2**.5-1)), rtol=1e-4, atol=1e-8)
    assert_close(pseudo_huber(a, 0*a), torch.tensor((c*(2**.5-1)+5-c)/2), rtol=1e-4, atol=1e-6)

def test_no_gradient_goes_through_the_target():
    from sdlearn.fast.consistency import consistency_loss
    x0, told = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(6, 1)
    teacher, student = Shares(exact_share), Shares(exact_share)
    seen = []
    def ask(net, x_in, t, told):
        if net is student: seen.append((torch.is_grad_enabled(), t.tolist()))
        return ask_shares(net, x_in, t, told)
    consistency_loss(lambda g: (x0, told), teacher, 1., 10, ask=ask)(student, torch.Generator().manual_seed(0))
    (below, t_next), (above, t) = seen
    assert not below and above and all(a-b in (99, 100) for a, b in zip(t, t_next))

def test_a_consistency_training_is_not_gone_on_with_another_average_or_question(tmp_path):
    from sdlearn.fast.consistency import consistency_loss
    from sdlearn.train import fit
    teacher = Shares(exact_share).requires_grad_(False)
    def draw(g): return torch.randn(2, 1, 4, 4, generator=g), torch.zeros(4, 1)
    def another(net, x_in, t, told): return .5*ask_shares(net, x_in, t, told)
    def go_on(steps, ask=ask_shares, **how):
        loss = consistency_loss(draw, teacher, 1., 10, ask=ask, **how)
        return fit(Shares(exact_share), loss, steps, tmp_path/'s', progress=False)
    assert len(go_on(2))==2 and len(go_on(4))==4          # what the average has become is not compared
    for how in (dict(decay=.5), dict(ask=another)):
        with pytest.raises(ValueError, match='loss_and_data was'): go_on(6, **how)

def test_the_average_goes_after_its_own_student():
    from sdlearn.fast.consistency import Average
    one, other = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    average = Average(.75)
    def set_to(net, v): torch.nn.init.constant_(net.weight, v)
    def told(net):
        with average.follow(net): return net.weight.item()
    set_to(one, 1.)
    assert told(one)==1.
    set_to(one, 5.)
    assert told(one)==2. and one.weight.item()==5. and told(one)==2.75
    set_to(other, 9.)
    assert told(other)==9.                                               # another training starts anew
    with pytest.raises(ValueError, match='decay'): Average(1.5)

@pytest.mark.parametrize('n, original', ((1, 50), (2, 10), (3, 50), (4, 20), (8, 50)))
def test_lcm_takes_the_steps_of_diffusers(n, original):
    from diffusers import LCMScheduler
    from sdlearn.fast.consistency import lcm_plan, lcm_timesteps
    from sdlearn.sample import make_plan, noise_from, sample
    from sdlearn.schedule import sigma_at
    def bent(x, sigma, t): return sigma*(x+torch.sin(x.roll(1, -1)))/(sigma**2+1)
    config = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False)
    theirs = LCMScheduler.from_config(config, original_inference_steps=original)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    def end(plan):
        *_, last = sample(plan, bent, plan.start(noise), noise_from([torch.Generator().manual_seed(5)]))
        return last.x_next
    ours = end(lcm_plan(n, original))
    theirs.set_timesteps(n)
    assert lcm_timesteps(n, original)==theirs.timesteps.tolist()
    z, g = noise, torch.Generator().manual_seed(5)
    for t in theirs.timesteps:
        s = sigma_at(t.item())
        z = theirs.step(bent(z*(s**2+1)**.5, s, t.item()), t, z, generator=g).prev_sample
    assert_close(ours, z, rtol=1e-5, atol=1e-5)
    assert_close(end(make_plan(theirs, n)), z, rtol=1e-4, atol=1e-4)      # and as a plan of diffusers' own

def test_a_consistency_student_is_asked_for_steps_that_it_knows():
    from sdlearn.fast.consistency import lcm, lcm_timesteps
    for n in (0, 51, 2., None, True):
        with pytest.raises(ValueError, match='1 to 50'): lcm_timesteps(n)
    with pytest.raises(ValueError, match='trained stops'): lcm_timesteps(2, 1001)
    with pytest.raises(ValueError, match='expected timesteps'): next(lcm(lambda x, s, t: x, torch.ones(1, 1, 2, 2), [1., 0.]))

def test_one_step_of_a_scheduler_must_start_from_noise():
    import diffusers
    from sdlearn.sample import make_plan
    def plan(name, **how):
        kind = getattr(diffusers, f'{name}Scheduler')
        return make_plan(kind(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', **how), 1)
    assert plan('LCM', clip_sample=False).timesteps==[999]
    assert plan('DDIM', clip_sample=False, timestep_spacing='trailing').timesteps==[999]
    for name in ('DDIM', 'DDIMInverse'):
        with pytest.raises(ValueError, match='starts at sigma 0.03'): plan(name, clip_sample=False)
# ---------------------------------------------------------------- make it fast: cache

def small_unet():
    from sdlearn.unet import UNet
    return randomized(UNet(dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=12,
                                attention_head_dim=2, in_channels=4, out_channels=4, up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
                                down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'))))

@torch.no_grad()
def test_a_cache_leaves_out_the_deep_floors_and_nothing_else():
    from sdlearn.fast.cache import FeatureCache, shallow
    from sdlearn.unet import prepare
    net, plan = small_unet(), make_plan('ddim', 7)
    words, x, y = torch.randn(2, 7, 12), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    handed = []
    hook = net.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda _, args: handed.append(args[0]))
    right = net(x, 500, words)
    hook.remove()
    deep = handed[0][:, :-8]
    assert torch.equal(shallow(net, x, 500, words, deep), right)            # its own deep features: the answer
    assert not torch.allclose(shallow(net, x, 500, words, -deep), right) and not torch.allclose(shallow(net, x, 40, words, deep), right)
    plain, cache, same = prepare(net), FeatureCache(net, plan, 3), FeatureCache(net, plan, 1)
    asked = []
    net.mid_block.register_forward_pre_hook(lambda *_: asked.append(1))
    for _ in range(2):                                                      # a second picture begins like the first
        asked.clear()
        said = [cache(x if i%2 else y, t, words) for i, t in enumerate(plan.timesteps)]
        assert len(asked)==3
        for i, t in enumerate(plan.timesteps):
            full = plain(x if i%2 else y, t, words)
            assert torch.equal(said[i], full)==(i%3==0) and torch.equal(same(x if i%2 else y, t, words), full)
    handed.clear()                                                          # what is kept comes from below, not from the skip
    hook = net.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda _, args: handed.append(args[0]))
    net(y, plan.timesteps[0], words)
    hook.remove()
    assert_close(said[1], shallow(net, x, plan.timesteps[1], words, handed[0][:, :-8]), rtol=1e-4, atol=1e-4)
    t = plan.timesteps[1]
    other = torch.randn(2, 7, 12)                                           # other words: nothing from before is of use
    assert_close(cache(x, t, other), net(x, t, other), rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        z = x.clone().requires_grad_()
        assert torch.equal(cache(z, t, words), net(z, t, words))

def test_what_cannot_be_cached_is_refused():
    from sdlearn.fast.cache import FeatureCache, cached_predictor
    from sdlearn.load import SD
    net, plan = small_unet(), make_plan('ddim', 7)
    for name in ('heun', 'pndm'):
        with pytest.raises(ValueError, match='asks once per step, got one that asks'): FeatureCache(net, make_plan(name, 7))
    FeatureCache(net, make_plan('pndm', 1))                                 # one step: one call
    for bad, words in ((dict(unet=None), 'our own UNet'), (dict(every=0), 'whole number'), (dict(every=1.5), 'whole number')):
        with pytest.raises(ValueError, match=words): FeatureCache(**dict(unet=net, plan=plan)|bad)
    with pytest.raises(TypeError, match='expected a Plan'): FeatureCache(net, 7)
    with pytest.raises(ValueError, match='timestep of the plan'): FeatureCache(net, plan).full(500.5)
    assert [i for i, t in enumerate(plan.timesteps) if FeatureCache(net, plan, 4).full(t)]==[0, 4]
    assert FeatureCache(net, plan.after(2), 4).full(plan.timesteps[2])      # image-to-image begins with a full answer
    sd = SD(None, None, None, net, Path('.'))
    ask, x = cached_predictor(sd, torch.randn(2, 77, 12), plan, 2, 3.), torch.randn(1, 4, 8, 8)
    with torch.no_grad(): assert [*sample(plan, ask, plan.start(x))][-1].x_next.shape==x.shape

# ---------------------------------------------------------------- make it fast: speed

def test_a_packed_unet_is_the_plain_one_and_follows_its_weights(monkeypatch):
    import copy, pickle
    from dataclasses import replace
    import sdlearn.fast.speed as speed
    from sdlearn.fast.cache import FeatureCache
    from sdlearn.load import SD
    net, words, x = small_unet(), torch.randn(2, 7, 12), torch.randn(2, 4, 8, 8)
    sd = SD(None, None, None, net, Path('.'))
    def same(quick, *args):
        with torch.no_grad(): assert_close(quick(*args), net(*args), rtol=1e-4, atol=1e-4)
    unet = speed.packed(sd).unet
    for n in (2, 1, 2):
        for w in (words, -words): same(unet, x[:n], 500, w[:n])
    layers = [m for m in unet.quick.modules() if hasattr(m, 'kept')]
    if speed.can_pack():
        assert {type(m) for m in layers}=={speed._PackedConv, speed._PackedLinear}
        assert all(len(m.kept)==2 for m in layers if isinstance(m, speed._PackedConv))
    before, kept = unet.quick, unet.kept
    same(unet, x, 500, words+1)
    assert unet.quick is not before and unet.kept is kept       # other words: packed as it was
    with torch.no_grad(): net.conv_in.weight.mul_(2)
    same(unet, x, 400, words)
    assert unet.kept is not kept                                # other weights: packed anew
    for side in (2, 4, 6, 8, 10, 12): same(unet, torch.randn(2, 4, side, side), 500, words)
    layers = [m for m in unet.quick.modules() if hasattr(m, 'kept')]
    assert all(len(m.kept)<=4 for m in layers) and (not speed.can_pack() or any(len(m.kept)>1 for m in layers))
    net.double()
    same(unet, x.double(), 500, words.double())                 # not packed, and right
    net.float()
    plan = make_plan('ddim', 5)
    cache, plain = FeatureCache(unet, plan, 2), FeatureCache(net, plan, 2)
    with torch.no_grad():
        for t in plan.timesteps: assert_close(cache(x, t, words), plain(x, t, words), rtol=1e-4, atol=1e-4)
    for copied in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))): same(copied, x, 500, words)
    again = speed.packed(replace(sd, unet=unet)).unet
    assert again.unet is net and dict(again.named_parameters()).keys()==dict(net.named_parameters()).keys()
    with pytest.raises(ValueError, match='expected our own UNet, got FeatureCache'): speed.packed(replace(sd, unet=cache))
    for odd in (None, net):
        with pytest.raises(ValueError, match='what load_sd gives'): speed.packed(odd)
    monkeypatch.setattr(speed, '_private', ('_gone',))
    with pytest.warns(UserWarning, match='nothing gets faster'): slow = speed.packed(sd).unet
    same(slow, x, 500, words)
    assert not [m for m in slow.quick.modules() if hasattr(m, 'kept')]

# ---------------------------------------------------------------- make it fast: export

@torch.no_grad()
def test_a_file_is_asked_as_a_unet_is():
    from sdlearn.fast.export import OnnxUNet, break_even, need, run_file
    from sdlearn.unet import predict_noise
    net, x, words = small_unet(), torch.randn(4, 4, 8, 8), torch.randn(4, 7, 12)
    sizes = []
    def run(x_in, t, text_embeddings): return sizes.append((len(x_in), *t.tolist())) or net(x_in, t, text_embeddings)
    run.shapes = dict(x_in=[2, 4, 8, 8], t=[2], text_embeddings=[2, 7, 12])
    ours = OnnxUNet(run)
    for t in (500, 3., torch.tensor(7), torch.tensor([1., 2., 300., 400.])):
        assert_close(predict_noise(ours, x, t, words), net(x, t, words), rtol=1e-4, atol=1e-4)
    assert sizes[-2:]==[(2, 1., 2.), (2, 300., 400.)]
    for bad in (x[:3], torch.randn(4, 4, 8, 16)):
        with pytest.raises(ValueError, match='Export anew'): ours(bad, 3, words[:len(bad)])
    with pytest.raises(ValueError, match='one text embedding per picture'): ours(x, 3, words[:2])
    assert break_even(10, 3., 1.)==5 and break_even(10, 1., 2.)==math.inf
    with pytest.raises(ImportError, match=r"pip install 'sdlearn\[export\]'"): need('no_such_package')
    with pytest.raises(ValueError, match='expected an engine out of'): run_file('x.onnx', 'abacus')
    with pytest.raises(ValueError, match='export_onnx'): run_file('nowhere.onnx')

@torch.no_grad()
def test_what_is_exported_is_what_is_asked():
    from types import SimpleNamespace
    from sdlearn.fast.export import parts
    from sdlearn.text import TextEncoder
    from sdlearn.vae import VAE, decode
    vae = randomized(VAE(dict(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
                              down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2)))
    text = randomized(TextEncoder(dict(vocab_size=50, hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                       max_position_embeddings=7, hidden_act='quick_gelu', bos_token_id=48, eos_token_id=49)))
    sd = SimpleNamespace(unet=small_unet(), vae=vae, text_encoder=text)
    made, latents = parts(sd, 2), torch.randn(2, 4, 8, 8)
    assert {k: [*v[1]] for k, v in made.items()}==dict(unet=['x_in', 't', 'text_embeddings'], text_encoder=['ids'], decoder=['latents'])
    assert made['text_encoder'][1]['ids'].dtype==torch.int64 and made['unet'][1]['text_embeddings'].shape==(2, 7, 12)
    assert made['decoder'][1]['latents'].shape==(2, 4, 8, 8)
    assert_close(made['decoder'][0](latents), decode(vae, latents), rtol=1e-4, atol=1e-4)
    ids = torch.randint(0, 48, (2, 7))
    assert torch.equal(made['text_encoder'][0](ids), text(ids))
# ---------------------------------------------------------------- make it fast: a small decoder

small_config = dict(latent_channels=4, in_channels=3, out_channels=3, encoder_block_out_channels=(6,)*4, num_encoder_blocks=(0, 1, 2, 0),
                    decoder_block_out_channels=(5,)*4, num_decoder_blocks=(2, 0, 1, 1))

@torch.no_grad()
def test_a_small_vae_equals_diffusers():
    import warnings
    from diffusers import AutoencoderTiny
    from sdlearn.fast.decoder import TinyVAE
    from sdlearn.vae import decode, encode
    theirs = randomized(AutoencoderTiny(**small_config, scaling_factor=.5))
    ours = TinyVAE(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, z = torch.rand(2, 3, 16, 24)*2-1, 4*torch.randn(2, 4, 2, 3)
    assert_close(ours.encoder(x), theirs.encode(x).latents, rtol=1e-4, atol=1e-5)
    assert_close(ours.decoder(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)
    for vae in (ours, theirs):                          # the same door as for a large one; its scale is obeyed
        assert_close(encode(vae, x), theirs.encode(x).latents*.5, rtol=1e-4, atol=1e-5)
        assert_close(encode(vae, x, torch.Generator()), encode(vae, x))             # no cloud to draw from
        assert_close(decode(vae, z), theirs.decode(z/.5).sample, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match='multiple of 8'): encode(vae, torch.zeros(1, 3, 12, 16))
        with pytest.raises(ValueError, match='(B,4,h,w)'): decode(vae, torch.zeros(1, 3, 2, 2))
    with warnings.catch_warnings(record=True) as said:  # half precision that overflows is decoded again
        warnings.simplefilter('always')
        ours.decoder.layers[0].weight *= 1e5
        image = decode(ours.half(), z[:1]*100)
    assert image.dtype==torch.float32 and image.isfinite().all() and 'float32' in str(said[0].message)

@torch.no_grad()
def test_every_setting_of_a_small_vae_is_obeyed_or_refused():
    from diffusers import AutoencoderTiny
    from sdlearn.fast.decoder import TinyVAE, tiny_config
    x = torch.randn(1, 4, 2, 2)
    kept, refused = hold_to_the_table(tiny_config, TinyVAE, AutoencoderTiny, small_config, lambda net: net.decoder(x))
    assert kept>=3 and refused>=3, (kept, refused)
    for odd in (dict(num_decoder_blocks=(1, 1)), dict(num_encoder_blocks=(1, 1, 1, -1)), dict(num_decoder_blocks=3),
                dict(decoder_block_out_channels=(5, 5, 5, 6))):
        with pytest.raises(ValueError, match='every floor and one width'): TinyVAE(small_config|odd)

@torch.no_grad()
def test_doubling_and_convolving_are_one_kernel():
    from torch.nn import functional as F
    from sdlearn.fast.decoder import UpConv, painted
    ends = torch.tensor([1., 2, 2, 1])
    assert torch.equal(painted(torch.ones(1, 1, 3, 3))[0, 0], ends[:, None]*ends)    # patches that overlap
    up, x = randomized(UpConv(3)), torch.randn(2, 3, 4, 5)
    assert_close(up(x), F.conv2d(F.interpolate(x, scale_factor=2.), up.weight, padding=1), rtol=1e-4, atol=1e-5)
    corner = torch.zeros(1, 1, 3, 3)
    corner[..., 0, 2] = 1                              # looks up and to the right
    up = UpConv(1)
    up.weight.copy_(corner)
    spot = torch.zeros(1, 1, 3, 3)
    spot[..., 1, 1] = 1
    assert up(spot)[0, 0].nonzero().tolist()==[[3, 1], [3, 2], [4, 1], [4, 2]]       # so it lands below and to the left

def test_what_a_small_decoder_is_taught():
    from torch.nn import functional as F
    from sdlearn.fast.decoder import distil_loss, edge_loss
    ramp = torch.arange(8.).expand(1, 3, 8, 8)*.1
    zero = torch.zeros(1, 3, 8, 8)
    for x in (ramp, ramp.mT): assert_close(edge_loss(x, zero), torch.tensor(.1))      # one way of two, and the other is flat
    assert_close(edge_loss(ramp+ramp.mT+.5, zero), torch.tensor(.2))
    z = torch.randn(5, 4, 6, 9)
    pictures = F.interpolate(z[:, :3], scale_factor=8)
    def large(z): return F.interpolate(z[:, :3], scale_factor=8)
    for side, seen in ((4, (4, 4)), (8, (6, 8)), (99, (6, 9))):
        sizes = set()
        def net(z): return sizes.add(tuple(z.shape)) or large(z)
        fn = distil_loss(z, pictures, 7, side)
        assert all(fn(net, torch.Generator().manual_seed(i))==0 for i in range(9)) and sizes=={(7, 4, *seen)}
    assert_close(distil_loss(z, pictures)(lambda z: large(z)+.5, torch.Generator().manual_seed(0)), torch.tensor(.5+4*.25))
    assert distil_loss(z, pictures)(lambda z: large(z).flip(-1), torch.Generator().manual_seed(0))>.1
    for bad in ((z, pictures[:4]), (z, pictures[..., :-8]), (z[:0], pictures[:0]), (z, pictures, 0), (z, pictures, 4, 0)):
        with pytest.raises(ValueError, match='expected'): distil_loss(*bad)

def test_a_glance_is_the_best_linear_map():
    from torch.nn import functional as F
    from sdlearn.fast.decoder import fit_preview, preview
    colours = torch.tensor([[.1, 0, 0], [0, .2, 0], [0, 0, -.3], [.05, .05, .05], [.2, 0, -.1]])
    z = torch.zeros(1, 4, 2, 3)
    z[0, 1, 1, 2] = 1
    seen = preview(z, colours)
    assert_close(seen[0, :, 0, 0], colours[4])
    assert_close(seen[0, :, 1, 2], colours[1]+colours[4])
    assert preview(z+99, colours).abs().max()==1        # colours, whatever the latents
    z = torch.randn(6, 4, 5, 4)
    grain = torch.randn(6, 3, 5, 8, 4, 8)*.1
    grain -= grain.mean((3, 5), keepdim=True)           # what is finer than a latent does not count
    pictures = F.interpolate(torch.einsum('bchw,ck->bkhw', z, colours[:4])+colours[4][:, None, None], scale_factor=8)
    assert_close(fit_preview(z, pictures+grain.reshape(pictures.shape)), colours, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match='40x32'): fit_preview(z, pictures[..., :16])
    with pytest.raises(ValueError, match='fit_preview'): preview(z, colours[:4])

@torch.no_grad()
def test_the_small_vae_in_the_box(bundles):
    from dataclasses import replace
    from diffusers import AutoencoderTiny
    from safetensors import safe_open
    from sdlearn.fast.decoder import load_small, small_path
    from sdlearn.idea.autoencoder import psnr
    from sdlearn.core import images_to_tensor
    from sdlearn.pipeline import txt2img
    from sdlearn.pocket.scenes import render
    from sdlearn.vae import decode, encode
    assert sum(f.stat().st_size for f in small_path().iterdir())<1e6
    with safe_open(small_path()/'diffusion_pytorch_model.safetensors', 'pt') as f:
        assert all(f.get_tensor(k).dtype==torch.float16 for k in f.keys())
    small, theirs = load_small(), AutoencoderTiny.from_pretrained(small_path(), use_safetensors=True)
    sd = bundles['own']
    x = images_to_tensor([render('fox', background='beach', seed=1)[0]])
    z = encode(sd.vae, x)
    large = decode(sd.vae, z).clamp(-1, 1)
    assert_close(decode(small, z), theirs.decode(z).sample, rtol=0, atol=1e-5)
    assert_close(encode(small, x), theirs.encode(x).latents, rtol=0, atol=1e-5)
    assert psnr(decode(small, z).clamp(-1, 1), large)>22
    assert (encode(small, x)-z).square().mean()<.45**2
    how = dict(num_inference_steps=2, seed=0, progress=False)
    [a], [b] = (txt2img(bundle, 'a fox', **how) for bundle in (sd, replace(sd, vae=small)))
    assert a!=b and psnr(images_to_tensor(b), images_to_tensor(a))>17
# ---------------------------------------------------------------- guidance as an input

def guided_pair(dim=32):
    "A tiny student whose scale is heard, and diffusers' network with its weights"
    from diffusers import UNet2DConditionModel
    from sdlearn.fast.guided import GuidedUNet
    from sdlearn.unet import UNet
    torch.manual_seed(0)
    net = randomized(GuidedUNet(UNet(tiny_unet), (1., 8.), dim))
    theirs = UNet2DConditionModel(**tiny_unet|dict(time_cond_proj_dim=dim))
    theirs.load_state_dict(net.diffusers_state())
    x, words = torch.randn(3, 4, 8, 8), torch.randn(3, 77, tiny_unet['cross_attention_dim'])
    return net, theirs, x, torch.tensor([999, 500, 3]), words

def test_guidance_features_are_those_of_diffusers():
    from diffusers import LatentConsistencyModelPipeline
    from sdlearn.fast.guided import guidance_features
    for dim in (256, 33):
        for scale in (1., 3.3, 7.5, 13.7):
            want = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([scale-1]), dim)
            assert_close(guidance_features(scale, dim), want, rtol=0, atol=1e-6)
            assert_close(guidance_features(torch.tensor([scale, 2.]), dim)[:1], want, rtol=0, atol=2e-3) # float32 scales

@torch.no_grad()
def test_a_network_is_told_its_guidance_as_diffusers_tells_it():
    from sdlearn.adapt.lora import put_lora
    from sdlearn.fast.guided import GuidedUNet, guidance_features
    net, theirs, x, t, words = guided_pair()
    w = torch.tensor([1., 3.25, 8.])
    said = net(x, t, words, w)
    assert_close(said, theirs(x, t, words, timestep_cond=guidance_features(w, 32)).sample, rtol=1e-4, atol=1e-4)
    for i in range(3):
        row = x[i:i+1], t[i:i+1], words[i:i+1]
        assert_close(net.at(w[i].item())(*row), said[i:i+1], rtol=1e-4, atol=1e-4)
    assert (net(x, t, words, 8.)-net(x, t, words, 1.)).abs().max()>1e-2
    plain = net.network(x, t, words)                                # no hook is left behind
    assert (plain-said).abs().max()>1e-2 and torch.equal(plain, net.network(x, t, words))
    with pytest.raises(ValueError): net(x[:, :2], t, words, 2.)     # nor after an error
    assert torch.equal(plain, net.network(x, t, words))
    fresh = GuidedUNet(net.network)
    assert torch.equal(fresh(x, t, words, 5.), plain)               # it starts as its teacher
    around = GuidedUNet(theirs, dim=32)                             # diffusers' own network inside
    around.cond_proj.load_state_dict(net.cond_proj.state_dict())
    assert_close(around(x, t, words, w), said, rtol=1e-4, atol=1e-4)
    for m in put_lora(net.network, 2, names=('linear_1', 'to_q')).values(): torch.nn.init.normal_(m.up.weight)
    assert (net(x, t, words, 3.)-said).abs().max()>1e-2             # with low-rank changes beside the layers too
    assert_close(net.at(3.)(x, t, words), net(x, t, words, 3.), rtol=1e-4, atol=1e-4)

@torch.no_grad()
def test_a_guided_student_learns_the_line_through_two_answers():
    from sdlearn.fast.guided import Answers, guided_loss, teacher_answers
    from types import SimpleNamespace
    from sdlearn.denoiser import noise_predictor
    from sdlearn.sample import make_plan, sample
    from sdlearn.schedule import Schedule, scale_input
    net, theirs, x, t, words = guided_pair()
    g = torch.Generator().manual_seed(0)
    scales, emb = torch.tensor([1., 4., 8.]), torch.cat([words*0, words])
    plan = make_plan('ddim', 4)
    for kind in ('epsilon', 'v_prediction'):
        sd = SimpleNamespace(unet=net.network, schedule=Schedule(prediction_type=kind), guidance_scale=4.)
        got = teacher_answers(sd, emb, x, scales, plan)
        assert got.t.tolist()==[t for t in plan.timesteps for _ in range(3)] and [len(v) for v in got]==[12]*5
        for i in range(3):                                          # each went its own way, that of its scale
            row = [v[i::3] for v in got]
            assert_close(net.network(*row[:3]), row[4], rtol=1e-3, atol=1e-4)
            assert_close(net.network(*row[:2], row[2]*0), row[3], rtol=1e-3, atol=1e-4)
            way = [*sample(plan, noise_predictor(sd, emb[i::3], scales[i].item()), plan.start(x[i:i+1]))]
            assert_close(torch.cat([scale_input(s.x, s.sigma) for s in way]), row[0], rtol=1e-3, atol=1e-3)
    class Student(torch.nn.Module):
        cond_proj, scales, seen = torch.nn.Linear(1, 1), (2., 6.), []
        def forward(self, x_in, t, words, w):
            self.seen.append(w)
            return 3*w[:, None, None, None]+0*x_in
    one = torch.ones(5, 4, 8, 8)
    line = Answers(one, torch.zeros(5), words[:1].expand(5, -1, -1), 0*one, 3*one)
    student = Student()
    assert guided_loss(line, 500)(student, g)<1e-8                  # uncond + w (text - uncond) = 3w
    w = student.seen[0]
    assert 2<=w.min()<2.1 and 5.9<w.max()<=6 and abs(w.mean()-4)<.2
    assert_close(guided_loss(line._replace(uncond=one), 500)(student, g), (1-student.seen[1]).square().mean()) # 1 + 2w

@torch.no_grad()
def test_the_strength_of_a_lora_is_a_guidance_scale():
    from sdlearn.adapt.lora import put_lora
    from sdlearn.denoiser import ask_network
    from sdlearn.fast.guided import Answers, strength_loss
    net, theirs, x, t, words = guided_pair()
    text = ask_network(net.network, x, t, words)
    low = put_lora(net.network, 2)                                  # it has learned nothing: says what `text` is
    answers, seen = Answers(x, t, words, text-1, text), []
    for seed in range(20):
        lost = strength_loss(answers, 5., 6)(net.network, torch.Generator().manual_seed(seed))
        strength, = {m.scale for m in low.values()}
        assert_close(lost, torch.tensor((4*strength)**2), rtol=1e-3, atol=1e-4)
        seen.append(strength)
    assert 0<min(seen)<.6 and .9<max(seen)<=1
    with pytest.raises(ValueError, match='largest guidance scale'): strength_loss(answers, 0.)
    with pytest.raises(ValueError, match='^expected bs'): strength_loss(answers, 5., 0)

@torch.no_grad()
def test_guidance_is_told_once_and_never_twice():
    from sdlearn.denoiser import noise_predictor
    from sdlearn.fast.guided import GuidedUNet, guided_predictor, teacher_answers
    from sdlearn.schedule import scale_input
    net, theirs, x, t, words = guided_pair()
    both = torch.cat([words*0, words])
    asked = []
    hook = net.network.conv_in.register_forward_hook(lambda module, args, out: asked.append(len(args[0])))
    said = guided_predictor(net, words, 3.)(x, 2., 500.)
    hook.remove()
    assert asked==[3]                                               # one call for each picture
    assert_close(said, net(scale_input(x, 2.), 500, words, 3.), rtol=1e-4, atol=1e-4)
    for bad, say in ((lambda: net(x, t, words), 'expected a guidance_scale'), (lambda: net(x, t, words, 9.), 'from 1 to 8'),
                     (lambda: noise_predictor(net, both, 4.)(x, 2., 500.), 'do not guide it again'),
                     (lambda: noise_predictor(net, both, 1.)(x, 2., 500.), 'expected a guidance_scale'),
                     (lambda: guided_predictor(net, words, float('nan')), 'from 1 to 8'),
                     (lambda: guided_predictor(net, both, 2.)(x, 2., 500.), 'one text embedding'),
                     (lambda: guided_predictor(net, words[0], 2.), '77'), (lambda: guided_predictor(net.network, words, 2.), 'two calls'),
                     (lambda: GuidedUNet(net), 'a plain network'), (lambda: GuidedUNet(theirs, 8.), 'least, most'),
                     (lambda: GuidedUNet(theirs, (3, 3)), 'least, most'), (lambda: net.at('much'), 'from 1 to 8'),
                     (lambda: teacher_answers(net, words, x, torch.ones(3), None), 'two halves'),
                     (lambda: teacher_answers(net, both, x, torch.ones(2), None), 'for each picture')):
        with pytest.raises(ValueError, match=say): bad()

# ---------------------------------------------------------------- the page that draws

@pytest.fixture
def js(tmp_path): # runs code beside the page's files; what its last line gives
    node = shutil.which('node')
    if not node: pytest.skip('Node.js is not installed')
    shutil.copytree(package/'web', tmp_path, dirs_exist_ok=True)
    shutil.copy(package/'checkpoint'/'tokenizer'/'merges.txt', tmp_path)
    (tmp_path/'package.json').write_text('{"type": "module"}', encoding='utf8')
    def run(code, **given):
        values = [f'const {k} = {json.dumps(v)};' for k, v in given.items()]
        *before, last = code.strip().split('\n')
        lines = [*values, *before, f'console.log(JSON.stringify({last}))']
        (tmp_path/'check.js').write_text('\n'.join(lines), encoding='utf8')
        done = subprocess.run([node, 'check.js'], cwd=tmp_path, capture_output=True, encoding='utf8')
        assert not done.returncode, done.stderr
        return json.loads(done.stdout)
    return run

def test_the_page_draws_torchs_noise(js):
    from sdlearn.core import generator_of
    cases = [(0, 1024), (5, 16), (5, 17), (5, 47), (2**32-1, 640), (2**31, 3000)] # past one round of 624
    drawn = js("import { normal } from './noise.js';\ncases.map(([seed, n]) => [...normal(seed, n)])", cases=cases)
    for (seed, n), got in zip(cases, drawn):
        assert_close(torch.tensor(got), torch.randn(n, generator=generator_of(seed)), atol=2e-6, rtol=1e-5)

page_reads = '''import { readFileSync } from 'node:fs';
import { Tokenizer, readPrompt, readWeights, looksGarbled } from './tokenizer.js';
const tokenizer = new Tokenizer(readFileSync('merges.txt', 'utf8'), said);
const read = text => ({ ...readPrompt(tokenizer, text, t => t), text: readWeights(text).text, garbled: looksGarbled(text) });
texts.map(text => { try { return read(text) } catch (e) { return e.message } })'''

def odd_prompts(n): # all kinds of letters, marks and brackets
    import random
    rng = random.Random(0)
    kinds = ['abc xyz', "it's'll'd'm've't're", '(:1.5)', '\\(', '\\)', '0123456789', 'é ñ ü ß İ Σ', '“‘’”', 'ﬁﬄﬆ', 'ＦＯＸ　ｶﾞ', '🦊🎩👩‍👩', '狐狸水獭', 'ひらカタ',
             '\t\n\r\u2028\xa0', '\x00\x07\x1b[1m', '.,;!?-_/', 'नमस्ते', 'مرحبا', 'e\u0301', '<|endoftext|>', '½²Ⅷ', '\x80\x93\x85', 'ǅŉĲ', '# & ~']
    kinds += [['(', ' (fox ', 'x('], [':1.3)', ':.5) ', ': 2)', ':+1)']]*3
    def one(): return ''.join(rng.choice([rng.choice(k), k]) if isinstance(k, str) else rng.choice(k)
                              for k in rng.choices(kinds, k=rng.randint(1, 12)))
    return [one() for _ in range(n)]

def test_the_page_reads_prompts_as_python_does(js):
    from sdlearn.page import tokenizer_settings
    from sdlearn.tokenizer import Tokenizer, read_weights, token_weights, tokenize
    tokenizer = Tokenizer.from_folder(package/'checkpoint'/'tokenizer')
    texts = odd_prompts(800)+['', 'a fox '*60, "it's "*50, 'word '*77+'(x:2)', '('+'word '*90+':2)',
                             '(<|endoftext|> a:2)',  '(a fox:2) '*30, '((a:2) b:3)', 'x'*400, '(a:9)', '(2:3)', '(:2)', '(a (b:.5):2.)']
    told = js(page_reads, texts=texts, said=tokenizer_settings(tokenizer))
    compared = weighted = cut = 0
    for text, got in zip(texts, told):
        try: plain = read_weights(text)[0]
        except ValueError as e:
            assert got.startswith('expected a weight from 0 to 5'), (text, e)
            continue
        if got['garbled']: continue                         # said, and not mended
        said = heard(lambda: tokenize(tokenizer, plain))
        assert got['text']==plain and got['ids']==tokenize(tokenizer, plain)[0].tolist(), repr(text)
        assert_close(torch.tensor(got['weights']).float(), token_weights(tokenizer, text), msg=lambda m: f'{text!r}: {m}')
        notes = ' '.join(got['notes']).replace(' A token is a word or a piece of one; the start and the end count too.', '')
        assert re.sub('[“”]', "'", notes)==said.replace('see "', "see '").replace('" and', "' and").replace('". S', "'. S"), text
        compared, weighted, cut = compared+1, weighted+bool(set(got['weights'])-{1}), cut+bool(said)
    assert compared>700 and weighted>50 and cut>3, (compared, weighted, cut)

def test_the_page_says_which_words_were_never_seen(js):
    from sdlearn import load_sd
    from sdlearn.page import tokenizer_settings, zero_runs
    from sdlearn.pipeline import unseen_words
    from sdlearn.text import text_core
    sd = load_sd(networks='own')
    table = text_core(sd.text_encoder).embeddings.token_embedding.weight
    texts = odd_prompts(300)+['an otter, a QUARK, a (quark:1.3) and 🦠🦠', '', 'cat '*75+'quark', 'cat '*74+'quark', 'quark '+'cat '*90, '<|endoftext|> quark']
    code = page_reads.replace("({ ...readPrompt(tokenizer, text, t => t),", "({ unseen: tokenizer.unseen(tokenizer.encode(readWeights(text).text, t => t)),")
    found = 0
    for text, got in zip(texts, js(code, texts=texts, said=tokenizer_settings(sd.tokenizer)|dict(runs=zero_runs(table)))):
        if isinstance(got, str) or got['garbled']: continue
        assert got['unseen']==unseen_words(sd, text), repr(text)
        found += bool(got['unseen'])
    assert found>100
    for rows, runs in (([0, 0, 1, 0], '2 1 1'), ([1, 0], '0 1 1'), ([0], '1'), ([1, 1], '0 2')):
        assert zero_runs(torch.tensor(rows)[:, None].float())==runs

def test_seeds_and_names_of_the_page(js):
    code = '''import { fileName, nextSeed, pythonOf, readSeed } from './texts.js';
const tried = f => text => { try { return f(text) } catch (e) { return e.message } };
[seeds.map(tried(readSeed)), seeds.map(tried(nextSeed)), prompts.map(p => fileName(p, 1)), prompts.map(p => pythonOf('sd', p, 1))]'''
    prompts = ['-', '', ' (red:1.3) fox!', 'x'*300, 'x'*59+' y', 'Ñandú 🦊 狐狸', 'a "b"\\\n\x00\u2028']
    seeds = ['0', ' 7 ', '4294967295', '-5', '1.5', '4294967296', '99999999999', '', 'abc', '1e3']
    read, following, names, lines = js(code, seeds=seeds, prompts=prompts)
    assert read[:3]==[0, 7, 2**32-1] and following[:3]==[1, 8, 0]
    assert all(e==f'expected a seed from 0 to 4294967295, got “{s}”: a whole number' for s, e in zip(seeds[3:], read[3:])) and read[3:]==following[3:]
    assert names==['picture-1.png', 'picture-1.png', 'red-1-3-fox-1.png', 'x'*60+'-1.png', 'x'*59+'-1.png', 'ñandú-狐狸-1.png', 'a-b-1.png']
    assert [ast.literal_eval(ast.parse(line).body[1].value.value.args[1]) for line in lines]==prompts

def test_a_page_says_how_its_checkpoint_is_loaded(bundles):
    from sdlearn import load_sd
    from sdlearn.page import loading_line
    sd = load_sd(networks='own', fast=True)
    assert loading_line(sd)=='load_sd(fast=True)' and loading_line(bundles['own']) is None
    with torch.no_grad(): next(sd.unet.parameters()).add_(1e-3)        # trained further
    assert loading_line(sd) is None

def test_text_in_a_wrong_encoding_is_said(js):
    found = js("import { looksGarbled } from './tokenizer.js';\ntexts.map(looksGarbled)",
               texts=['cafÃ©', 'â€œquotedâ€\x9d', 'ðŸ¦Š', 'РїРёСЂРѕРі', 'café', 'Её ежик', 'Ã la carte', 'fox 🦊 “a”', 'ΑΈ', 'São Tomé £'])
    assert found==[True]*4+[False]*6

def test_the_page_steps_as_euler_does(js):
    from sdlearn.core import seeded_noise
    from sdlearn.sample import euler
    from sdlearn.text import weigh
    sigmas, ts = [14.6, 4., .7, 0.], [999., 500., 100.]
    steps = js('''import { draw } from './draw.js';
const map = (x, f) => Float32Array.from(x, f);
const noise = (x, t, words) => map(x, (v, i) => .9 * v + t / 1000 + words[i] * v * v);
const nets = { words: ids => map({ length: 48 }, (_, i) => ids[0] + i / 50), noise, sketch: x => map(x, v => v + .1), pixels: x => x };
const plan = { shape: [3, 4, 4], timesteps, sigmas, start_std: 14.6 };
const steps = [], wish = { ids: [1], weights: [1, 1.5, 0], nothing: [0] };
for await (const s of draw(nets, plan, wish, 9)) steps.push([s.i, s.last, [...s.x], [...s.x0], [...s.image]]);
steps''', timesteps=ts, sigmas=sigmas)
    flat = torch.arange(48)/50
    words = weigh((1+flat).reshape(1, 3, 16), flat.reshape(1, 3, 16), torch.tensor([[1., 1.5, 0.]])).reshape(1, 3, 4, 4)
    def ask(x, sigma, t):
        x = x/(sigma**2+1)**.5
        return .9*x+t/1000+words*x*x
    right = [*euler(ask, 14.6*seeded_noise((3, 4, 4), [9]), sigmas, ts)]
    assert len(steps)==3
    for step, (i, last, x, x0, image) in zip(right, steps):
        assert i==step.i and last==(i==2)
        assert_close(torch.tensor(x), step.x_next.flatten(), atol=1e-4, rtol=1e-4)
        assert_close(torch.tensor(x0), step.x0.flatten(), atol=1e-4, rtol=1e-4)
        seen = (step.x_next if last else step.x0+.1).clamp(-1, 1)
        assert_close(torch.tensor(image).reshape(4, 4, 4)[..., :3].float(), ((seen+1)*127.5)[0].permute(1, 2, 0), atol=.52, rtol=0)

def test_the_page_makes_bytes_as_python_does(js):
    from sdlearn.core import tensor_to_images
    import numpy as np
    planes = torch.linspace(-1.2, 1.2, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    got = js("import { toBytes } from './draw.js';\n[...toBytes(Float32Array.from(planes))]", planes=planes.tolist())
    right = np.asarray(tensor_to_images(planes.reshape(1, 3, 4, 4))[0])
    assert np.array_equal(np.array(got).reshape(4, 4, 4)[..., :3], right) and got[3::4]==[255]*16

def test_only_rows_that_are_not_zero_travel():
    from sdlearn.page import FewRows
    table = torch.zeros(9, 3)
    table[[0, 4, 8]] = torch.randn(3, 3)
    few = FewRows(table)
    assert len(few.rows)==4 and torch.equal(few(torch.arange(9)[None]), table[None])

def test_a_page_takes_a_student_alone(bundles):
    from dataclasses import replace
    from sdlearn.page import merges_of, page_plan, page_settings
    sd = bundles['own']
    with pytest.raises(ValueError, match='without guidance'): page_plan(sd)
    student = replace(sd, guidance_scale=1., sampler='euler', num_inference_steps=2,
                      schedule=replace(sd.schedule, timestep_spacing='trailing'))
    said = page_settings(student, 'a fox', 2**32-1, 'decoder')
    assert said['plan']['timesteps']==[999, 499] and len(said['plan']['sigmas'])==3 and said['networks']==3
    assert said['seed']==2**32-1 and said['tokenizer']['special']=={'<|startoftext|>': [49406], '<|endoftext|>': [49407]}
    for odd in (dict(guidance_scale=2.), dict(sampler='euler_ancestral'), dict(schedule=replace(student.schedule, prediction_type='v_prediction'))):
        with pytest.raises(ValueError, match='expected a student'): page_plan(replace(student, **odd))
    assert merges_of(bundles['own'].tokenizer)==merges_of(bundles['diffusers'].tokenizer)

def test_weights_of_a_page_take_half_the_bytes(tmp_path):
    onnx = pytest.importorskip('onnx')
    import numpy as np
    from onnx.reference import ReferenceEvaluator
    from sdlearn.page import halve_weights
    g = torch.Generator().manual_seed(0)
    w, b = torch.randn(40, 30, generator=g)*torch.logspace(-3, 1, 40)[:, None], torch.full((300,), -3e38)
    w[3] = 0
    node = onnx.helper.make_node('MatMul', ['w', 'x'], ['y'])
    value = lambda name, *shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    weights = [onnx.numpy_helper.from_array(v.numpy(), name) for name, v in dict(w=w, mask=b).items()]
    graph = onnx.helper.make_graph([node], 'g', [value('x', 30)], [value('y', 40)], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 20)], ir_version=10)
    file = tmp_path/'net.onnx'
    onnx.save(model, str(file))
    halve_weights(file)
    halved = onnx.load(str(file))
    kinds = {t.name: onnx.numpy_helper.to_array(t).dtype for t in halved.graph.initializer}
    assert kinds=={'w_whole': np.int16, 'w_scale': np.float32, 'mask': np.float32}
    onnx.checker.check_model(halved)
    x = torch.randn(30, generator=g)
    got, = ReferenceEvaluator(halved).run(None, dict(x=x.numpy()))
    assert_close(torch.from_numpy(got)/w.abs().amax(1).clamp(min=1e-9), (w@x)/w.abs().amax(1).clamp(min=1e-9), atol=3e-4, rtol=0)

def test_what_a_runtime_lacks_is_said(tmp_path):
    import tarfile
    from sdlearn.page import unpack_runtime
    (tmp_path/'a').write_text('x', encoding='utf8')
    with tarfile.open(tmp_path/'odd.tgz', 'w:gz') as tar: tar.add(tmp_path/'a', 'package/dist/ort.wasm.bundle.min.mjs')
    with pytest.raises(ValueError, match='without package/dist/ort-wasm-simd'): unpack_runtime(tmp_path/'odd.tgz', tmp_path)
    with tarfile.open(tmp_path/'whole.tgz', 'w:gz') as tar:
        for name in ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm'): tar.add(tmp_path/'a', f'package/dist/{name}')
    unpack_runtime(tmp_path/'whole.tgz', tmp_path)
    assert (tmp_path/'ort.js').read_text(encoding='utf8')==(tmp_path/'ort.wasm').read_text(encoding='utf8')=='x'

# ---------------------------------------------------------------- what only we define, broken once on purpose

@pytest.fixture(scope='module')
def own(): # never changed
    from sdlearn.load import load_sd
    return load_sd(networks='own')

def test_training_pictures_stand_upright_and_in_the_order_asked():
    import numpy as np
    from sdlearn.core import images_to_tensor
    from sdlearn.pocket.captions import Scene
    from sdlearn.pocket.pictures import batch_of
    from sdlearn.pocket.scenes import draw
    two = [draw(Scene(n)) for n in ('fox', 'car')]
    assert_close(batch_of(np.stack([*map(np.asarray, two)]), [1, 0]), images_to_tensor(two[::-1]))

def test_the_standard_view_is_not_turned():
    import numpy as np
    from sdlearn.pocket.atlas import cutout
    from sdlearn.pocket.captions import Scene
    from sdlearn.pocket.scenes import _colored, _drawn, _turned, render
    for i in range(20):
        rng = np.random.default_rng(i)
        rgba = _colored(_drawn('fox', None, Scene('fox'), rng), None, Scene('fox'), rng)
        assert np.array_equal(_turned(rgba, Scene('fox'), rng), cutout('fox', 0))
    whole, small = (np.asarray(render('otter', 'neon', side=s)[0], float) for s in (128, 64))
    assert np.abs(small-whole.reshape(64, 2, 64, 2, 3).mean((1, 3))).mean()<2

def test_files_of_another_run_are_refused(tmp_path):
    from sdlearn.pocket import codec
    from sdlearn.train import save_state, saver
    save_state(dict(another=1), tmp_path/'x.pt')
    for ask in (lambda: codec.kept(tmp_path/'x.pt', 'mark', dict), lambda: codec._load_both(tmp_path/'x.pt', 'mark', None)):
        with pytest.raises(ValueError, match='something else'): ask()
    save, written = saver(tmp_path/'y.pt', 60), []
    for ended in (False, False, True): save(ended, lambda: written.append(ended) or {})
    assert written==[True] and (tmp_path/'y.pt').exists()
    saver(None, 0)(True, lambda: written.append('nowhere'))
    assert written==[True]

def test_a_decoder_ends_as_its_average(monkeypatch):
    from types import SimpleNamespace
    from sdlearn.pocket import codec
    from sdlearn.train import put
    from sdlearn.vae import VAE
    net = torch.nn.Linear(2, 2)
    put(dict(net.named_parameters()), {k: torch.full_like(p, 3.) for k, p in net.named_parameters()})
    assert all((p==3).all() for p in net.parameters())
    def one_step(half, *others): # whose average is 3 everywhere
        averaged = {k: torch.full_like(p, 3.) for k, p in codec.trained(half).items()}
        yield SimpleNamespace(i=0, loss=1., good=True, averaged=averaged), None
    monkeypatch.setattr(codec, 'in_turns', one_step)
    vae = VAE(tiny_vae)
    before = {k: v.clone() for k, v in vae.encoder.state_dict().items()}
    assert codec.train_decoder(vae, lambda g: None, 1, progress=False)==[1.]
    assert all((p==3).all() for p in vae.decoder.parameters()) and not vae.training
    assert all(torch.equal(v, before[k]) for k, v in vae.encoder.state_dict().items())

def test_what_the_recipe_starts_and_ends_with(tmp_path):
    from unittest.mock import patch
    from sdlearn.pocket import recipe
    for name, p in recipe.new_networks()[1].text.named_parameters():
        if p.ndim==2 and 'emb' not in name: assert abs(p.std()*p.shape[1]**.5-1)<.03, name
    assert [recipe._settings(r, 'vae', 1.)['warmup'] for r in (recipe.Recipe(), recipe.tiny)]==[150, 2]
    a = torch.nn.Linear(3, 3)
    b = torch.nn.Linear(3, 3)
    b.load_state_dict(a.state_dict())
    assert all(torch.equal(x, y.half().float()) for x, y in zip(recipe._rounded(a).parameters(), b.parameters()))
    told = []
    def ask(unet, emb, scale): return told.append(emb[:, 0, 0].tolist()) or (lambda x, sigma, t: x/sigma)
    with patch.multiple(recipe, noise_predictor=ask, decode=lambda vae, x: torch.zeros(len(x), 3, 8, 8)):
        recipe.sheet(None, torch.nn.Linear(1, 1), torch.arange(4.)[:, None, None].expand(4, 2, 2), tmp_path/'a.png', n=2)
    assert told==[[1, 2, 1, 2]]

def test_the_command_gives_each_picture_its_seed(tmp_path, monkeypatch):
    from PIL import Image
    from sdlearn import cli, pipeline
    from sdlearn.infotext import read_settings
    from sdlearn.load import load_sd
    true, calls = pipeline.txt2img, []
    def remembers(*args, **kwargs):
        calls.append(kwargs['seed'])
        return true(*args, **kwargs)
    monkeypatch.setattr(pipeline, 'txt2img', remembers)
    def run(*args):
        with pytest.raises(SystemExit) as e:
            cli.main([*map(str, args)])
            raise SystemExit(0)
        assert e.value.code in (0, None)
    run('a cat', '--n', 6, '--seed', 3, '--steps', 1, '--height', 16, '--width', 16, '-o', tmp_path/'a.png')
    assert calls==[[3, 4, 5, 6], [7, 8]]
    assert [read_settings(tmp_path/f'a-{i}.png')['seed'] for i in range(6)]==[3, 4, 5, 6, 7, 8]
    run('a cat', '--n', 5, '--seed', 3, '--steps', 2, '--height', 16, '--width', 16, '--gif', tmp_path/'a.gif', '-o', tmp_path/'b.png')
    with Image.open(tmp_path/'a.gif') as film: assert film.n_frames==2
    for name in ('photo', 'hole'): Image.new('RGB', (16, 16), 'white').save(tmp_path/f'{name}.png')
    asked = ('a cat', '--image', tmp_path/'photo.png', '--steps', 2)
    run(*asked, '--mask', tmp_path/'hole.png', '-o', tmp_path/'part.png')
    run(*asked, '-o', tmp_path/'whole.png')
    assert [read_settings(tmp_path/f'{f}.png')['strength'] for f in ('part', 'whole')]==[1, .6]
    for i in (1, 2): Image.new('RGB', (8*i, 8)).save(tmp_path/f'{i}.png')
    monkeypatch.setattr(Path, 'iterdir', lambda self: iter([tmp_path/'2.png', tmp_path/'1.png']))
    assert [im.width for im in cli._pictures_in(tmp_path)]==[8, 16]

def test_settings_in_a_picture_as_others_read_them(tmp_path):
    from PIL import Image
    from sdlearn.infotext import infotext, save_picture
    assert infotext(dict(prompt='a cat', seed=0, guidance_scale=0.), (8, 16)).endswith('CFG scale: 0.0, Seed: 0, Size: 8x16')
    shown = [infotext(dict(sampler=s), (8, 8)).split(',')[0].strip() for s in ('euler', 'euler_ancestral', 'lms', 'pndm')]
    assert shown==['Sampler: Euler', 'Sampler: Euler a', 'Sampler: LMS', 'Sampler: PLMS']
    save_picture(Image.new('RGB', (8, 8)), tmp_path/'a.jpg', dict(prompt='a'))
    assert max(Image.open(tmp_path/'a.jpg').quantization[0])<20

def test_a_study_shows_what_it_does_not_judge_by():
    from unittest.mock import patch
    from sdlearn.adapt import which
    asked, none = [], lambda *a, **k: []
    with patch.multiple(which, teach_word=none, teach_lora=none, teach_dreambooth=none, renderings=lambda *a: asked.append(a)):
        [*which._ways(None, 'orca', 2)]
    assert asked==[('orca', 4, 20)]
    taught = which.Taught('', None, None, 0, 1.)
    with patch.multiple(which, draw_taught=lambda sd, t, said, seed: ['before' if t is which.untaught else 'after']*6,
                        references=lambda *a: (0, 1), nearer=none, _counts=lambda r: 0, _judged=lambda *a: ({}, []),
                        _ways=lambda *a: [('word', taught)], drift=lambda a, b: (a[0], b[0])):
        rows, _ = which.study_one(None, 'orca', 0, None)
    assert rows['word']['drift']==('before', 'after')
    seeds = []
    with patch.multiple(which, draw_taught=lambda sd, t, said, seed: seeds.append(seed) or [], nearer=none, is_there=none,
                        is_still_it=none, _counts=none): which._judged(None, None, 'orca', 2, (0, 1))
    assert seeds==[200, 250]
    with patch.multiple(which, named_right=lambda im, s, kind, c: {(kind, 'clip'): [True], (kind, 'pixels'): [False]}):
        found = which.is_there([None], 'orca', [*which.wishes][:1])
    assert found['encoder'].tolist()==[True] and found['pixels'].tolist()==[False]

def test_rulers_of_a_checkpoint(own):
    from dataclasses import replace
    from unittest.mock import patch
    from sdlearn.judge import load_clip
    from sdlearn.pocket import evaluate as ev
    from sdlearn.pocket.atlas import subjects
    from sdlearn.pocket.captions import Scene, caption
    from sdlearn.pocket.scenes import draw
    asked = [Scene('fox'), Scene('owl')]
    assert ev.true_pictures(asked)==[draw(replace(s, seed=10**7+i)) for i, s in enumerate(asked)]
    said, clip, two = ['a picture of a fox', 'a picture of a car'], load_clip(), [draw(Scene(n)) for n in ('fox', 'car')]
    alone = sum(ev.clip_score([im], [s], clip) for im, s in zip(two, said))/2
    assert abs(ev.clip_score(two, said, clip)-alone)<.002 and ev.clip_score(two, said[::-1], clip)<.6*alone
    numbers = iter(range(9))
    with patch.object(ev, 'psnr', lambda y, x: float(next(numbers))): found = ev.evaluate_vae(own.vae, 9, 1)
    assert found['psnr']==4 and found['error']==round(7.5**.5/3, 2)
    with patch.object(ev, 'specks', lambda x, back, limit: torch.arange(len(x))<(1 if limit==.2 else 3)):
        found = ev.evaluate_vae(own.vae, 2, 4)
    assert (found['specks'], found['faint'])==(1, 2)
    flat = torch.zeros(1, 3, 128, 128)
    broad = flat.clone()
    broad[..., 108:118, 4:14] = .5
    assert ev.specks(flat, broad, limit=.45) and not ev.specks(flat, flat)
    assert ev._some(4)==subjects()[:120:30] and len(ev._some(48))==48 and len(ev._some(121))==121
    assert ev.student_prompts(9)[::4]==[caption(Scene(n)) for n in subjects()[:3]]

def test_what_explorers_show():
    from sdlearn.explore import _channel, _points, _toy
    import numpy as np
    assert np.asarray(_channel(torch.tensor([[-4., 0., 9.]]), 3))[0, :, 0].tolist()==[0, 128, 255]
    x, s = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(), 1.5
    log_p = (-(x[:, None]-_points).square().sum(-1)/(2*s**2)).logsumexp(1).sum()
    assert_close(_toy(x, s, 0).detach(), -s*torch.autograd.grad(log_p, x)[0])

def test_films_and_grids(tmp_path):
    from PIL import Image
    from sdlearn.core import image_grid, save_animation
    tints = [Image.new('RGB', (32, 32), c) for c in ('red', 'green', 'blue', 'white')]
    with Image.open(save_animation(tints, tmp_path/'t.gif', fps=4, hold=1.)) as gif:
        times = [gif.seek(i) or gif.info['duration'] for i in range(gif.n_frames)]
    assert times==[250]*3+[1250]
    assert [image_grid(tints[:1]*n).size for n in (2, 5, 9)]==[(64, 32), (96, 64), (96, 96)]

def test_a_page_is_told_the_plan_as_it_is(own):
    from unittest.mock import patch
    import numpy as np
    onnx = pytest.importorskip('onnx')
    from sdlearn import page
    from sdlearn.load import load_sd
    w = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    init = onnx.numpy_helper.from_array(w, 'w')
    scale, *_ = page._halved(onnx, init)
    step = onnx.numpy_helper.to_array(scale)
    assert (abs(onnx.numpy_helper.to_array(init)*step-w)<=.51*step).all()
    sd = load_sd(networks='own', fast=True)
    plan = page.page_plan(sd)
    with patch.object(page, 'plan_for', lambda sd: plan._replace(sigmas=[*plan.sigmas[:-1], .02])):
        with pytest.raises(ValueError, match='without guidance'): page.page_plan(sd)
    with patch.object(page, 'page_plan', lambda sd: plan._replace(start_std=15.)):
        assert page.page_settings(sd, 'a', 1, 'sketch')['plan']['start_std']==15

def test_every_path_has_a_noise_of_its_own_and_the_scale_it_was_made_for(own, tmp_path):
    from sdlearn.core import seeded_noise
    from sdlearn.fast.student import Made, teacher_paths, write_paths
    from sdlearn.text import embed_prompts
    one, two = (write_paths(own, ['A cat']*2, tmp_path/str(bs), bs=bs)[0] for bs in (1, 2))
    assert not torch.equal(two[0], two[1])
    assert_close(two.float(), one.float(), atol=.02, rtol=0)
    emb = embed_prompts(own.tokenizer, own.text_encoder, ['', 'A cat'])
    noise = seeded_noise((4, 16, 16), [1])
    assert_close(teacher_paths(own, emb, noise, Made(folded=1.)), teacher_paths(own, emb[1:].repeat(2, 1, 1), noise), atol=1e-3, rtol=0)

def test_a_judge_is_read_anew_when_a_file_of_its_changes(tmp_path):
    from sdlearn.judge import load_clip
    from sdlearn.load import pocket_path
    for part in ('clip', 'text_encoder', 'tokenizer'): shutil.copytree(pocket_path()/part, tmp_path/part)
    for file in ('clip/model.safetensors', 'text_encoder/model.safetensors', 'tokenizer/merges.txt'):
        first = load_clip(tmp_path)
        os.utime(tmp_path/file, (1, 1))
        assert load_clip(tmp_path) is not first, file
    assert_close(load_clip().text_features(['a cat', 'two dogs']).norm(dim=-1), torch.ones(2))

def test_a_checkpoint_in_two_precisions_and_a_student_of_another_schedule(tmp_path, own):
    from dataclasses import replace
    from safetensors.torch import load_file, save_file
    from sdlearn import load
    shutil.copytree(load.pocket_path(), tmp_path/'m')
    file = tmp_path/'m'/'unet'/'diffusion_pytorch_model.safetensors'
    save_file({k: torch.zeros_like(v) for k, v in load_file(file).items()}, file.with_name('diffusion_pytorch_model.fp16.safetensors'))
    half, full = (load.load_sd(tmp_path/'m', dtype=k, networks='own') for k in (torch.float16, torch.float32))
    assert not half.unet.conv_in.weight.any() and full.unet.conv_in.weight.any()
    assert not any(m.training for net in (full.text_encoder, full.vae, full.unet) for m in net.modules())
    assert load._put_student(replace(full, path=load.pocket_path(), schedule=replace(full.schedule, beta_end=.02)), True).schedule.beta_end==.02
    sd = load.load_sd(fast=True, networks='own')
    sd = replace(sd, schedule=replace(sd.schedule, timestep_spacing='linspace'))
    assert load.load_sd(sd.save(tmp_path/'mine'), networks='own').schedule.timestep_spacing=='linspace'

def test_a_lora_hears_schedule_seed_and_half_precision():
    from dataclasses import replace
    from sdlearn.adapt.lora import all_layers, learn_lora, lora_loss, merge_lora
    from sdlearn.schedule import SD_V1
    from sdlearn.train import batch_rng
    unet = small_unet()
    width = unet.config.cross_attention_dim
    g = torch.Generator().manual_seed(0)
    z, words = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, width, generator=g)
    a, b = (lora_loss(z, words, 2, s)(unet, batch_rng(0, 0)) for s in (SD_V1, replace(SD_V1, beta_end=.05)))
    assert abs(a-b)>1e-4
    a, b = (learn_lora(unet, lambda net, g: 0, 0, seed=s, progress=False) for s in (0, 1))
    assert not any(torch.equal(p.down, b[k].down) for k, p in a.items())
    pairs = {k: replace(p, up=torch.randn(p.up.shape, generator=g)*.1) for k, p in a.items()}
    layers = all_layers(unet.half())
    right = {k: (layers[k[5:]].weight.float()+.3*p.change(layers[k[5:]].weight)).half() for k, p in pairs.items()}
    merge_lora(pairs, .3, unet=unet)
    assert all(torch.equal(layers[k[5:]].weight, w) for k, w in right.items())

def test_rulers_of_digits_and_pictures():
    from torch.nn import functional as F
    from sdlearn.guidance import contrast_loss
    from sdlearn.idea.autoencoder import psnr
    from sdlearn.idea.contrast import ImageEncoder, retrieval
    from sdlearn.idea.noise import SmallUNet
    from sdlearn.idea.score import scramble, shift
    assert retrieval(torch.tensor([[1., 0.], [.9, .9]]), torch.tensor([[1., 0.], [.5, .1]]))==(.5, 1.)
    net, x = ImageEncoder(), torch.randn(1, 3, 128, 128)
    assert_close(net(x).detach(), net(F.avg_pool2d(x, 2)).detach())
    x = torch.zeros(2, 3, 8, 8)
    assert abs(psnr(x+torch.tensor([.02, .2])[:, None, None, None], x)-30)<1e-3
    white = torch.ones(1, 3, 8, 8)
    stripes = white.clone()
    stripes[..., ::2] = 0
    both = contrast_loss(torch.cat([white, stripes]), 0.)
    assert_close(both, (contrast_loss(white, 0.)+contrast_loss(stripes, 0.))/2)
    g = torch.Generator().manual_seed(0)
    assert (shift(-torch.ones(9, 1, 8, 8), g, 3)==-1).all()
    a, b = scramble(torch.arange(64.).view(1, 1, 8, 8).repeat(2, 1, 1, 1), g)
    assert not torch.equal(a, b) and a.flatten().sort().values.equal(b.flatten().sort().values)
    net, x = SmallUNet(), torch.randn(1, 1, 28, 28, generator=g)
    torch.nn.init.zeros_(net.up.weight)                       # all that is left comes over the bridge
    a, b = (net(v, torch.ones(1)).detach()-v/2**.5 for v in (x, x.flip(3)))
    assert not torch.allclose(a, b, atol=1e-4)

def test_a_guided_student_obeys_its_schedule():
    from dataclasses import replace
    from sdlearn.denoiser import as_noise
    from sdlearn.fast.guided import GuidedUNet, guided_predictor
    from sdlearn.schedule import SD_V1, scale_input
    net = GuidedUNet(small_unet())
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 77, net.config.cross_attention_dim)
    plain, v = (guided_predictor(net, words, 3., s)(x, 2., 500.).detach()
                for s in (SD_V1, replace(SD_V1, prediction_type='v_prediction')))
    assert_close(v, as_noise(plain, scale_input(x, 2.), 2., 'v_prediction'))

def test_a_bad_step_leaves_the_average_alone():
    from sdlearn.train import train_steps
    p, calls = torch.nn.Parameter(torch.ones(1)), []
    def loss(g):
        calls.append(1)
        return p.sum()*(1. if len(calls)<3 else float('nan'))
    met = [(s.good, s.averaged['p'].clone()) for s in train_steps(loss, dict(p=p), 3, warmup=0)]
    assert [g for g, _ in met]==[True, True, False] and torch.equal(met[1][1], met[2][1])

def test_a_whole_file_goes_before_its_parts():
    from sdlearn.folders import _best
    parts = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    assert _best(['model.safetensors', *parts], None)==['model.safetensors'] and _best(parts, None)==parts

def test_what_lies_beside_the_weights_of_a_network_is_read_as_diffusers_reads_it(tmp_path):
    from diffusers import UNet2DConditionModel
    from sdlearn.folders import read_arrays, weights_files
    net = UNet2DConditionModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
                               down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))
    net.save_pretrained(tmp_path)
    shutil.copy(tmp_path/'diffusion_pytorch_model.safetensors', tmp_path.parent/'old')
    with torch.no_grad(): net.conv_in.weight.add_(1.)
    net.save_pretrained(tmp_path, max_shard_size='60KB')
    shutil.copy(tmp_path.parent/'old', tmp_path/'diffusion_pytorch_model.safetensors')
    read = {k: v for f in weights_files(tmp_path) for k, v in read_arrays(f)[0].items()}
    assert_close(read['conv_in.weight'], UNet2DConditionModel.from_pretrained(tmp_path).conv_in.weight.data)
    for f in tmp_path.glob('*.index*'): f.unlink()
    assert len(weights_files(tmp_path))==1

def test_old_weights_in_half_precision_are_told(tmp_path):
    import warnings
    from safetensors.torch import save_file
    from sdlearn.folders import weights_files
    w = torch.randn(4, 3)
    save_file(dict(w=w, one=torch.ones(())), tmp_path/'model.safetensors')
    save_file(dict(w=w.half(), one=torch.ones(()).half()), tmp_path/'model.fp16.safetensors')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        weights_files(tmp_path, 'fp16')
    save_file(dict(w=w*1.01, one=torch.ones(())), tmp_path/'model.safetensors')
    with pytest.warns(UserWarning, match='model.fp16.safetensors holds other weights than model.safetensors'): weights_files(tmp_path, 'fp16')

def packages_of(folder): # six sets that draw a fox (two of them alike), a swan and an orca; CLDR knows some more
    from sdlearn.pocket.emoji import sets
    names = {'😀': 'grinning face', '🐵': 'monkey face', '🦊': 'fox', '🦢': 'swan', '🦤': 'dodo', '🚩': 'triangular flag',
             '🧃': 'beverage box', '🏧': 'ATM sign', '🪩': 'mirror ball', '🪷': 'lotus', '🪸': 'coral', '🪹': 'empty nest',
             '🪺': 'nest with eggs', '🛝': 'playground slide', '🛞': 'wheel', '🛟': 'ring buoy', '🫘': 'beans', '🫙': 'jar', '🧌': 'troll'}
    words = {'🦢': ['swan', 'white swan', 'bird'], '🦤': ['bird', 'dodo bird'], '🧃': ['juice box', 'beverage', 'box']}
    said = {c: dict(tts=[n], default=words[c]) if c in words else dict(tts=[n]) for c, n in names.items()}
    files = {'cldr-annotations-full/annotations/en/annotations.json': dict(annotations=dict(annotations=said)),
             'cldr-annotations-derived-full/annotationsDerived/en/annotations.json':
                 dict(annotationsDerived=dict(annotations={'🏳': dict(default=['a word, and no name'])}))}
    for k, name in enumerate(sets):
        drawn = dict(fox={'body': f'fox {max(k, 1)}'}, swan=dict(body='swan 0'), orca=dict(body='orca 0'))
        files[f'@iconify-json/{name}/icons.json'] = dict(icons=drawn)
        files[f'@iconify-json/{name}/chars.json'] = {'1f98a': 'fox', '1f9a2': 'swan', '1facd': 'orca'}
    for name, what in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(json.dumps(what), encoding='utf8')

def test_an_atlas_is_made_from_packages(tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image
    from sdlearn.pocket import emoji
    from sdlearn.pocket.atlas import cell
    packages_of(tmp_path/'modules')
    def plain(icon, icons): # a square in a colour of its own; a transparent rim
        what, k = icon['body'].split()
        im = Image.new('RGBA', (256, 256))
        im.paste((40*int(k), dict(fox=0, swan=120, orca=240)[what], 60, 255), (20, 20, 236, 236))
        return im
    monkeypatch.setattr(emoji, 'rasterize', plain)
    emoji.make_atlas(tmp_path/'modules', tmp_path/'a'/'b')
    read = {n: json.loads((tmp_path/'a'/'b'/f'{n}.json').read_text(encoding='utf8')) for n in ('subjects', 'unseen', 'atlas')}
    assert '🦊' in (tmp_path/'a'/'b'/'subjects.json').read_text(encoding='utf8')       # to be read by people, too
    rows = {r['char']: r for r in read['subjects']}
    assert [r['char'] for r in read['subjects'][:2]]==['🐶', '🐱'] and len(rows)==len(read['subjects'])
    # beyond the core: what is a thing and no sign; a keyword that ends as the name does is a name, too
    chars = [*rows]
    assert chars[chars.index('🦢'):][:4]==['🦢', '🦤', '🧃', '🪩'] and '🚩' not in rows and '😀' not in rows
    assert chars.count('🦊')==1 and rows['🦢']['names']==['swan', 'white swan'] and rows['🧃']['names']==['beverage box', 'box']
    assert rows['🦊']['designs']==emoji.sets[1:] or rows['🦊']['designs']==[emoji.sets[0], *emoji.sets[2:]]
    assert rows['🦢']['designs']==emoji.sets[:1] and rows['🐶']['designs']==[]
    sheet = np.asarray(Image.open(tmp_path/'a'/'b'/'atlas.webp').convert('RGBA')).astype(int)
    for char, red, green in [('🦊', 40, 0), ('🦢', 0, 120)]:
        y, x = (cell*k for k in divmod(rows[char]['at'], 60))
        assert np.abs(sheet[y+cell//2, x+cell//2]-(red, green, 60, 255)).max()<12, char
    assert next(r for r in read['unseen'] if r['char']=='🫍')['designs']==emoji.sets   # none is left out for being alike
    assert read['atlas']==dict(version=emoji.version)

# ---------------------------------------------------------------- found by reading

def test_a_training_alone_stays_where_its_network_is(monkeypatch):
    from types import SimpleNamespace
    from sdlearn import train
    elsewhere = SimpleNamespace(device=torch.device('meta'), num_processes=1, process_index=0,
                                is_main_process=True)   # as beside a GPU
    monkeypatch.setattr(train, 'processes', lambda: elsewhere)
    net = torch.nn.Linear(2, 1)
    train.fit(net, lambda net, g: net(torch.ones(1, 2)).square().mean(), 2, progress=False)
    assert net.weight.device.type=='cpu'

@pytest.mark.parametrize('stray', ['diffusion_pytorch_model (1)', 'diffusion_pytorch_model-old', 'backup', 'a_lora'])
def test_a_copy_beside_the_weights_is_not_taken(tmp_path, stray):
    from safetensors.torch import save_file
    from sdlearn.folders import weights_files
    for name in ('diffusion_pytorch_model', stray): save_file(dict(w=torch.ones(1)), tmp_path/f'{name}.safetensors')
    assert [f.name for f in weights_files(tmp_path)]==['diffusion_pytorch_model.safetensors']
    save_file(dict(w=torch.ones(1)), tmp_path/'diffusion_pytorch_model.fp16.safetensors')
    assert [f.name for f in weights_files(tmp_path, 'fp16')]==['diffusion_pytorch_model.fp16.safetensors']

@pytest.mark.parametrize('name', ['dreamlike-art/dreamlike-photoreal-2.0', 'SG161222/Realistic_Vision_V5.1_noVAE'])
def test_a_name_with_a_dot_is_looked_for_on_the_hub(name):
    from sdlearn.folders import find_checkpoint
    with pytest.raises((ValueError, OSError)) as e: find_checkpoint(name)
    assert 'none of them' not in str(e.value)
    with pytest.raises(ValueError, match='none of them'): find_checkpoint('models/sd.ckpt')

class Still(torch.nn.Module): # knows all about pictures of std 1, and says it in noise or in v
    def __init__(self, kind):
        super().__init__()
        from types import SimpleNamespace
        self.kind, self.p = kind, torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=4, cross_attention_dim=8)
    def forward(self, x_in, t, words):
        from sdlearn.denoiser import velocity
        from sdlearn.schedule import sigma_at, unscale_input
        sigma = sigma_at(t)
        x = unscale_input(x_in, sigma)
        eps = gauss(x, sigma)
        return eps if self.kind=='epsilon' else velocity(x-sigma[:, None, None, None]*eps, eps, sigma)

@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_a_student_that_is_its_teacher_makes_no_mistake(kind):
    from dataclasses import replace
    from sdlearn.denoiser import as_noise
    from sdlearn.fast.student import Made, landing_error, whole_path
    from sdlearn.sample import sample
    from sdlearn.schedule import SD_V1, scale_input
    plan, net = Made().plan(replace(SD_V1, prediction_type=kind)), Still(kind)
    words = torch.zeros(2, 77, 8)
    def ask(x, sigma, t):
        x_in = scale_input(x, sigma)
        return as_noise(net(x_in, torch.full((len(x),), t), words), x_in, sigma, kind)
    with torch.no_grad():
        path = [*sample(plan, ask, plan.start(torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))))]
        paths = torch.stack([*(scale_input(s.x, s.sigma) for s in path), path[-1].x_next], 1)
        for i in range(4): assert landing_error(net, paths, words, torch.tensor([i, i]), plan, kind).max()<1e-8
        for j, x in enumerate(whole_path(net, paths[:, 0], words, plan, kind)): assert_close(x, paths[:, j+1], rtol=1e-3, atol=1e-4)

lossy = """
from sdlearn.train import fingerprint
def loss(kind): return kind in {'eps', 'x0', 'v', 'noise', 'picture', 'score', 'velocity', 'sample'}
print(fingerprint(loss))
"""

def test_a_loss_is_the_same_in_another_process():
    def said(seed): return subprocess.run([sys.executable, '-c', lossy], env=os.environ|dict(PYTHONHASHSEED=seed),
                                          capture_output=True, text=True, check=True).stdout
    assert said('1')==said('2')!=''

def test_a_fingerprint_sees_every_number():
    from sdlearn.train import fingerprint
    few = torch.zeros(100_000)
    other = few.clone()
    other[1] = 5.           # between two of the sample
    assert fingerprint(few)!=fingerprint(other)
    few[2] = 5.             # the same numbers in another order
    assert fingerprint(few)!=fingerprint(other)
    net = torch.nn.BatchNorm1d(3).requires_grad_(False).eval()
    before = fingerprint(net)
    net.running_mean[0] = 3.
    assert fingerprint(net)!=before
    net.train()             # it counts for itself: not another net
    before = fingerprint(net)
    net.running_mean[0] = 4.
    assert fingerprint(net)==before
    for a, b in ((np.array(['2020-01-01'], 'M8[D]'), np.array(['1999-01-01'], 'M8[D]')), (np.array(['a', 'b']), np.array(['a', 'c'])),
                 (np.array([1, None], dtype=object), np.array([2, None], dtype=object)), (np.longdouble(1), np.longdouble(2))):
        assert fingerprint(a)!=fingerprint(b), a

def test_a_run_is_gone_on_with_as_it_began(tmp_path):
    from sdlearn.train import batch_rng, fit, load_state
    net, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
    def loss(net, g): return net(x).square().mean()
    def run(steps, file, **how): return fit(net, loss, steps, path=tmp_path/file, progress=False, **how)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    run(2, 'a', lr=.1, ema=.5)
    net.load_state_dict(start)
    with pytest.raises(ValueError, match='lr was 0.1 and is 0.001, ema was 0.5 and is 0.999'): run(4, 'a')
    run(2, 'b')
    assert len(run(4, 'b', lr=1e-3))==4         # what is usual may be said
    net.load_state_dict(start)
    def spoilt(net, g): return loss(net, g)*(float('nan') if g.initial_seed()//64%1_000_003==2 else 1)
    with pytest.raises(FloatingPointError) as said: fit(net, spoilt, 5, path=tmp_path/'c', progress=False)
    assert str(tmp_path) not in str(said.value) and not (tmp_path/'c').exists()
    net.load_state_dict(start)
    with pytest.raises(FloatingPointError, match='holds an earlier state.*another path'):
        fit(net, spoilt, 5, path=tmp_path/'d', progress=False, save_every=0)
    with torch.inference_mode():
        torch.set_grad_enabled(True)            # does not help here
        with pytest.raises(ValueError, match='outside'): run(2, 'e')
    with pytest.raises(ValueError, match='1000002'): batch_rng(0, 1_000_003)
    with pytest.raises(ValueError, match='a number of steps'): run(1_000_004, 'f')      # before any
    with pytest.raises(FileNotFoundError, match='there is no'): load_state(tmp_path/'none')

@pytest.mark.parametrize('name', ['euler', 'dpmpp_2m', 'unipc', 'lms'])
def test_a_sampler_goes_on_from_what_is_assigned(name):
    from sdlearn.sample import make_plan, sample
    def end(pushed):
        plan = make_plan(name, 10)
        for step in sample(plan, lambda x, sigma, t: (x-1)/(1+sigma**2)**.5, plan.start(torch.ones(1, 4, 2, 2))):
            if step.i==pushed: push(step)
        return step.x_next.mean().item()
    def push(step): step.x_next = step.x_next+2
    moved = end(5)-end(None)
    assert .2<moved<1.2, moved      # 2, less what the later steps take back
    def push(step): step.x_next += 2
    assert abs(end(5)-end(None)-moved)<1e-5

def test_a_message_names_what_is_wrong():
    from sdlearn.guidance import cfg, target_loss
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match='one guidance_scale, or one per picture'): cfg(x, x, torch.ones(3))
    with pytest.raises(ValueError, match=r'like pictures of shape \(2, 3, 8, 8\), got \(3, 3, 8, 8\)'): target_loss(x, torch.zeros(3, 3, 8, 8))

def test_a_grade_does_not_round():
    from sdlearn.core import agrees
    for wrong, right in ((2.9, 2), ([1.6, 2.2], [1, 2]), (torch.tensor([1+5j]), [1.])):
        assert not agrees(wrong, torch.tensor(right)), wrong
    assert agrees([True, False], torch.tensor([True, False])) and agrees(np.float32(.5), torch.tensor(.5))
    third = torch.full((3,), 1/3)
    for kind in (torch.float16, torch.bfloat16): assert agrees(third, third.to(kind)) and not agrees(third*1.02, third.to(kind))
    assert agrees(torch.fft.ifft(torch.fft.fft(third.double())).real, third) and agrees(np.ones(2), np.ones(2))

def test_words_are_taken_out_in_turn():
    from sdlearn.adapt.inversion import add_words, start_rows
    from sdlearn.load import load_sd
    sd = load_sd(networks='own')
    rows, n = start_rows(sd, 'cat'), len(sd.tokenizer)
    first, none, second = add_words(sd, {'<a>': rows}), add_words(sd, {}), add_words(sd, {'<b>': rows})
    with pytest.raises(ValueError, match='<a> to be what was learned last'): first()
    none()
    second()
    first()
    first()                 # out already
    assert len(sd.tokenizer)==n==len(sd.text_encoder.get_input_embeddings().weight)

def test_one_array_is_one_picture():
    from sdlearn.core import _is_one
    for x, one in ((np.zeros((8, 8)), True), (torch.zeros(8, 8, 3), True), (np.zeros((8, 8, 4), np.uint8), True),
                   (torch.zeros(12, 16, 4), False), (torch.zeros(4, 16, 16), False), ([1], False)): assert _is_one(x)==one

def test_other_data_make_another_fingerprint():
    from pathlib import PurePosixPath
    from sdlearn.train import fingerprint
    def holding(data): return lambda net, g: data
    def within(data): # looked at by an inner function alone
        scope = dict(DATA=data)
        exec('def loss(net, g): return sum(DATA[i] for i in (0, 1))', scope)
        return scope['loss']
    pairs = [(range(5), range(9)), (b'a', b'b'), (PurePosixPath('a'), PurePosixPath('b')), (torch.float16, torch.bfloat16),
             (slice(1), slice(2)), ({'a', 'b'}, {'a', 'c'})]
    for a, b in pairs: assert fingerprint(holding(a))!=fingerprint(holding(b)) and fingerprint(holding(a))==fingerprint(holding(a))
    assert fingerprint(within([1, 2]))!=fingerprint(within([1, 3]))

def test_half_precision_is_resumed_as_it_was_and_large_networks_are_finite():
    import copy
    from sdlearn.train import _finite, train_steps
    def run(stop=None, n=24):
        torch.manual_seed(0)
        net, state, losses = torch.nn.Linear(8, 1), None, []
        def loss(g): return (net(torch.randn(16, 8, generator=g)).float()*300).square().mean()
        def steps(state): return train_steps(loss, net, n, mixed_precision='fp16', lr=1e-2, warmup=1, state=state)
        for s in steps(None):
            losses.append(s.loss)
            if s.i+1==stop:
                state = copy.deepcopy(s.state())
                break
        return losses+[s.loss for s in steps(state)] if state else losses
    assert run(15)==run()
    assert _finite([torch.full((1000, 1000), .1).half()]) and not _finite([torch.tensor([1., math.inf]).half()])

@pytest.mark.skipif(sys.getfilesystemencoding()!='utf-8', reason='no such names here')
def test_a_name_that_the_console_cannot_write_stops_nothing(tmp_path, monkeypatch):
    import io
    from sdlearn.cli import main
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='cp1252'))
    assert main(['a fox', '-o', str(tmp_path/'猫.png'), '--steps', '1', '--n', '2'])==0
    assert len([*tmp_path.glob('猫*.png')])==2

def test_settings_too_long_for_a_jpeg_are_left_out_with_a_word(tmp_path):
    from PIL import Image
    from sdlearn.infotext import read_settings, save_picture
    said = dict(prompt='fox '*20_000, seed=3)
    with pytest.warns(UserWarning, match='too long for a JPEG'): save_picture(Image.new('RGB', (8, 8)), tmp_path/'a.jpg', said)
    save_picture(Image.new('RGB', (8, 8)), tmp_path/'a.png', said)
    assert (tmp_path/'a.jpg').exists() and read_settings(tmp_path/'a.png')['prompt']==said['prompt']

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='a disk that is always full')
def test_a_full_disk_is_told_in_a_sentence():
    from sdlearn.train import _write
    with pytest.raises(OSError, match='No space'): _write(dict(w=torch.ones(100_000)), '/dev/full')

def test_strength_0_gives_the_picture_back_and_looks_at_everything():
    import numpy as np
    from PIL import Image
    from sdlearn import img2img, inpaint, load_sd
    from sdlearn.pocket.scenes import render
    sd, image = load_sd(networks='own'), render('fox', seed=1)[0]
    hole = Image.new('L', image.size, 255)
    def same(a, b): return np.array_equal(np.asarray(a), np.asarray(b))
    still = img2img(sd, 'a cat', image, strength=0, seed=0)[0]
    assert same(inpaint(sd, 'a cat', image, hole, strength=0, seed=5)[0], still)
    assert same(inpaint(sd, 'a cat', image, hole, strength=0, paste_back=True, seed=5)[0], image)
    for odd in (dict(sampler='nonsense'), dict(guidance_interval='x'), dict(seed='x'), dict(negative_prompt=3)):
        with pytest.raises(ValueError): img2img(sd, 'a cat', image, strength=0, **odd)
        with pytest.raises(ValueError): inpaint(sd, 'a cat', image, hole, strength=0, **odd)

def test_one_thread_at_a_time_seeds_torch():
    import threading
    from sdlearn.core import seeded
    inside, go_on, drawn = threading.Event(), threading.Event(), []
    def first():
        with seeded(0):
            inside.set()
            go_on.wait(10)
            drawn.append(torch.rand(1))
    def second():
        with seeded(1): drawn.append(torch.rand(1))
    threads = [threading.Thread(target=f) for f in (first, second)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    threads[1].join(.2)
    assert threads[1].is_alive() and not drawn
    go_on.set()
    for t in threads: t.join(10)
    for seed, x in enumerate(drawn):
        with seeded(seed): assert torch.rand(1)==x

def test_braces_in_a_caption_mean_nothing():
    from types import SimpleNamespace
    from sdlearn import load_sd
    from sdlearn.adapt.inversion import _caption_ids
    sd = SimpleNamespace(tokenizer=load_sd(networks='own').tokenizer)
    ids = [_caption_ids(sd, ['<it>'], [c], 1) for c in ('a {} at 50%{', 'a {} of {x}', 'a {}')]
    assert not torch.equal(ids[0], ids[2])

def test_an_encoder_that_overflows_says_so():
    import copy
    from sdlearn import load_sd
    from sdlearn.vae import encode
    vae = copy.deepcopy(load_sd(networks='own').vae)
    vae.encoder.conv_out.weight.data.mul_(1e38)
    with pytest.raises(ValueError, match='overflow'), torch.no_grad(): encode(vae, torch.rand(1, 3, 64, 64))

def test_a_file_of_something_else_is_no_training_state(tmp_path):
    from sdlearn.train import load_state
    torch.save([1, 2], tmp_path/'a.pt')
    with pytest.raises(ValueError, match='training state, got list'): load_state(tmp_path/'a.pt')

# ---------------------------------------------------------------- values that a change of sign or size would not have shown

def test_new_scenes_are_beyond_all_training():
    from sdlearn.pocket.evaluate import first_new
    from sdlearn.pocket.recipe import Recipe, _settings, tiny
    assert first_new>=10*Recipe().pictures and first_new>2*10**6+10**6      # the student's prompts, too
    from dataclasses import replace
    assert _settings(replace(tiny, lr=.5), 'vae', 2e-3)['lr']==1e-3

def test_counts_are_asked_of_the_core_alone():
    from sdlearn.pocket.atlas import subjects
    from sdlearn.pocket.evaluate import examples
    from sdlearn.pocket.scenes import core
    assert {s.subject for s in examples('count', 40)}<={*subjects(core)}
    assert not {s.subject for s in examples('color', 40)}<={*subjects(core)}

def test_what_is_kept_of_an_evaluation(tmp_path, monkeypatch):
    from types import SimpleNamespace
    from sdlearn.pocket import evaluate as e
    kept = {}
    monkeypatch.setattr(e, 'evaluate', lambda *args: dict(fast=args[-1]))
    monkeypatch.setattr(e, 'update_facts', lambda path, **new: kept.update(new))
    monkeypatch.setattr(e, 'write_card', lambda path: None)
    for fast in (False, True):
        e._evaluate(SimpleNamespace(quick=True, path=None, steps=None, guidance=None, sampler=None, out=None, fast=fast, keep=True))
    assert kept==dict(metrics=dict(fast=False), student=dict(fast=True))

def test_the_command_hears_a_negative_prompt_and_passes_warnings_on(tmp_path, capsys, monkeypatch):
    from sdlearn import cli, pipeline
    heard, real = [], pipeline.txt2img
    monkeypatch.setattr(pipeline, 'txt2img', lambda *args, **kw: heard.append(kw['negative_prompt']) or real(*args, **kw))
    asked = ['a fox', '-o', str(tmp_path/'a.png'), '--steps', '1']
    assert cli.main([*asked, '--negative', 'snow'])==0 and cli.main([*asked, '--negative', 'qwxyz'])==0 and cli.main(asked)==0
    assert heard==['snow', 'qwxyz', None] and 'note: this checkpoint has never seen' in capsys.readouterr().err

def test_a_seed_of_more_than_32_bits_is_told():
    from sdlearn.core import generator_of
    with pytest.warns(UserWarning, match='32 bits'): generator_of(2**32+5)

def test_rulers_of_time():
    from sdlearn import bench
    calls = []
    rounds = bench.alternate(dict(a=lambda: calls.append('a'), b=lambda: calls.append('b')), 3)
    assert len(rounds)==3 and calls==['a', 'b']*4 and bench.spread([5, 1, 4, 2, 3])==(2, 3, 4)

def test_four_prompts_at_once_are_counted_per_picture(monkeypatch):
    from sdlearn import bench
    monkeypatch.setattr(bench, 'alternate', lambda sides, n: [dict(theirs=8., ours=4., packed=2.5, loop=8., lms=2., seed=3., four=16.)]*3)
    monkeypatch.setattr(bench, '_theirs', lambda steps: None)
    assert [r[1] for r in bench._warm(1, 3).values()]==[2, 3.2, 1, 1.5, 2]

def test_a_bundle_is_converted_whole():
    from sdlearn import load_sd
    sd = load_sd(networks='own').to(torch.bfloat16)
    for net in (sd.text_encoder, sd.vae, sd.unet): assert {p.dtype for p in net.parameters()}=={torch.bfloat16}

def test_what_a_batch_of_digits_costs():
    from sdlearn.idea.classes import batch_loss, noisy_batch
    x, y = torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9)
    def net(x_in, sigma, told): return .5*x_in
    x0, eps, sigma, told = noisy_batch(x, y, torch.Generator().manual_seed(1))
    said = net((x0+sigma[:, None, None, None]*eps)/(sigma[:, None, None, None]**2+1)**.5, sigma, told)
    right = ((said-eps).square().mean((1, 2, 3))*(sigma**2+1)).mean()
    assert_close(batch_loss(net, x, y, torch.Generator().manual_seed(1)), right)

def test_the_thin_layer_of_a_lora_keeps_the_size_of_what_goes_in():
    from sdlearn.adapt.lora import LowRank
    torch.manual_seed(0)
    low = LowRank(torch.nn.Linear(512, 64), rank=256)
    assert .8<low.down(torch.randn(64, 512)).std()<1.2

def test_losses_of_students_are_means():
    from sdlearn.fast.student import Made, landing_error, path_loss, whole_path, whole_path_loss
    plan, net, g = Made().plan(), Still('epsilon'), torch.Generator().manual_seed(0)
    paths, words = torch.randn(1, 5, 4, 4, 4, generator=g), torch.zeros(1, 77, 8)
    same = paths.expand(6, -1, -1, -1, -1), words.expand(6, -1, -1)
    one = torch.stack([landing_error(net, paths, words, torch.tensor([i]), plan)[0] for i in range(4)])
    with torch.no_grad():
        said = path_loss(*same, plan, bs=4)(net, torch.Generator().manual_seed(3))
        came = whole_path_loss(*same, plan, bs=4)(net, torch.Generator().manual_seed(3))
    assert one.min()<=said<=one.max()
    errors = torch.stack([(x-paths[:, j+1]).square().mean() for j, x in enumerate(whole_path(net, paths[:, 0], words, plan))])
    assert_close(came, (errors*torch.tensor([1/16, 2/16, 3/16, 1.])).sum().detach())

def test_an_average_goes_after_the_student_it_is_given():
    from sdlearn.fast.consistency import Average
    nets = [torch.nn.Linear(2, 1) for _ in range(2)]
    for net, value in zip(nets, (1., 5.)):
        for p in net.parameters(): torch.nn.init.constant_(p, value)
    slow = Average(.9)
    for net, value in zip(nets, (1., 5.)):
        with slow.follow(net): assert all((p==value).all() for p in net.parameters())

def test_a_target_is_missed_by_the_square():
    from sdlearn.guidance import target_loss
    assert_close(target_loss(torch.full((2, 3, 2, 2), .5), torch.zeros(1, 3, 2, 2)), torch.tensor(.25))

def test_a_decoder_that_overflows_is_asked_again_in_full():
    import copy
    from sdlearn import load_sd
    from sdlearn.vae import decode
    vae = load_sd(networks='own').vae
    half = copy.deepcopy(vae).bfloat16()
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    def burst(module, args, out): return out*float('inf') if out.dtype==torch.bfloat16 else out
    handle = half.decoder.conv_out.register_forward_hook(burst)
    with torch.no_grad(): assert (decode(half, z.bfloat16()).float()-decode(vae, z)).abs().mean()<.05
    handle.remove()

def useless_later(folder): # what would have been written, trained or drawn without a word
    from dataclasses import replace
    from sdlearn import load_sd, page, train, txt2img
    from sdlearn.adapt import dreambooth, finetune, inversion, lora
    from sdlearn.attention import word_map
    from sdlearn.fast import guided, student
    from sdlearn.guidance import blue_loss, target_loss
    from sdlearn.idea import score, steps
    from sdlearn.pocket import card, pictures, recipe
    from sdlearn.pocket.scenes import render
    sd, fox = load_sd(networks='own'), render('fox')[0]
    latents, words = torch.zeros(2, 4, 16, 16), torch.zeros(2, 77, 128)
    net = torch.nn.Linear(2, 1)
    yield from [
        lambda: inversion.save_word(folder/'a.safetensors', '<x>', torch.full((1, 4), math.nan)),
        lambda: inversion.save_word(folder/'a.safetensors', '<x>', torch.ones(1, 2, 4)),
        lambda: inversion.save_word(folder/'a.safetensors', ' ', torch.ones(1, 4)),
        lambda: inversion.encoded(sd, fox), lambda: inversion.encoded(sd, []),
        lambda: inversion.spread_timesteps(4, lowest=-1.),
        lambda: lora.save_lora({}, folder/'l.safetensors'), lambda: lora.lora_loss(latents, words, bs=0),
        lambda: finetune.learn_look(sd, [fox]*2, ['a', 'b'], None),
        lambda: dreambooth.learn_dreambooth(sd, [fox], 'a sks fox', ''),
        lambda: recipe.check_recipe(replace(recipe.tiny, precision='half')), lambda: recipe.check_recipe(replace(recipe.tiny, lr=math.nan)),
        lambda: recipe.check_recipe(replace(recipe.tiny, image_bs=2.5)),
        lambda: pictures.Pictures(folder, count=0), lambda: pictures.Pictures(folder, 4, side='x'),
        lambda: train.fit(net, lambda net, g: net.weight.sum(), 1, decay='no', progress=False),
        lambda: score.digits(labels=[1, 2, 3]), lambda: score.digits(torch.zeros(4, 8, 8), [.5, 1.5, 2., 3.], held_out=1),
        lambda: score.digits(held_out=True),
        lambda: steps.geometric_sigmas(3, 1., 5.), lambda: steps.geometric_sigmas(3, 1., 0.),
        lambda: blue_loss(torch.rand(3, 4, 4)), lambda: target_loss(torch.rand(4, 3, 2, 2), torch.rand(2, 3, 2, 2)),
        lambda: guided.guidance_features(3., dim=2),
        lambda: student.between(student.Made().plan(), (4, -3, 3, 3)), lambda: student.train_student(sd, 'a fox', folder, folder/'s.safetensors'),
        lambda: word_map(dict(a=torch.rand(1, 1, 64, 77)), [1], (8, 80)),
        lambda: render('fox', side=True), lambda: card.standard_error(.5, 0), lambda: card.facts(''),
        lambda: page.page_settings(sd, 5, 1, 'sketch'), lambda: page.unpack_runtime(folder/'no.tgz', folder),
        lambda: txt2img(sd, 'a', [['b']], seed=0)]

def test_what_would_be_useless_later_is_refused(tmp_path):
    for i, odd in enumerate(useless_later(tmp_path)):
        with pytest.raises((ValueError, IndexError), match='expected'): odd()
    assert i==32 and not [*tmp_path.glob('*.safetensors')]

def test_a_prompt_that_just_fits_is_not_said_to_be_cut():
    import warnings
    from sdlearn import load_sd
    from sdlearn.tokenizer import tokenize
    tokenizer = load_sd(networks='own').tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tokenize(tokenizer, ['a '*75, 'a fox', ''])
    with pytest.warns(UserWarning, match='at most 77 tokens, got 78'): tokenize(tokenizer, 'a '*76)

def test_numbers_of_any_library_are_kept_as_numbers(tmp_path):
    import numpy as np
    from PIL import Image
    from sdlearn.infotext import read_settings, save_picture
    said = dict(prompt='a fox', seed=np.int64(3), guidance_scale=torch.tensor(4.5), steps=np.float32(.5))
    save_picture(Image.new('RGB', (8, 8)), tmp_path/'a.png', said)
    assert read_settings(tmp_path/'a.png')==dict(prompt='a fox', seed=3, guidance_scale=4.5, steps=.5)

def test_pictures_that_are_shown_are_drawn(monkeypatch):
    import numpy as np
    from PIL import Image
    from sdlearn import core
    shown = []
    monkeypatch.setattr(core, 'show_figure', lambda fig, *args, **kw: shown.append(fig))
    core.show_images([Image.new('RGB', (4, 4), c) for c in ('red', 'blue', 'green')], ['a', 'b', 'c'], cols=2)
    axes = [ax for ax in shown[0].axes if ax.images]
    assert [tuple(np.asarray(ax.images[0].get_array())[0, 0]) for ax in axes]==[(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert [ax.get_title() for ax in axes]==['a', 'b', 'c']

def test_a_training_looks_at_its_place_before_it_works(tmp_path, monkeypatch):
    from sdlearn.pocket import recipe
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'holiday.jpg').write_bytes(b'')
    monkeypatch.setattr(recipe, 'rendering', None)         # what would work first
    with pytest.raises(ValueError, match='something else'): recipe.train(tmp_path/'run', tmp_path/'out', recipe.tiny)
    assert [p.name for p in (tmp_path/'out').iterdir()]==['holiday.jpg']

def test_blots_name_a_subject_and_pixels_all_else(monkeypatch):
    from sdlearn.pocket import evaluate as e
    sides = []
    monkeypatch.setattr(e, 'by_clip', lambda images, options, clip, part=None: [row[0] for row in options])
    monkeypatch.setattr(e, 'by_pixels', lambda images, options, side=64: sides.append(side) or [row[0] for row in options])
    for kind in ('subject', 'color', 'relation'): e.named_right([None], e.examples(kind, 1), kind, None)
    assert sides==[8, 64, 64]                               # who is where, of a relation; not who it is

# ---------------------------------------------------------------- what an inventive user does

import warnings            # noqa: E402
import numpy as np         # noqa: E402
from PIL import Image      # noqa: E402

def _some_lora(unet, seed, size=.05):
    from sdlearn.adapt.lora import lora_pairs, put_lora, take_lora
    low = put_lora(unet, 4, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for m in low.values(): m.up.weight.data = size*torch.randn(m.up.weight.shape, generator=g)
    pairs = lora_pairs(unet=unet)
    take_lora(unet)
    return pairs

def test_a_lora_under_another_one_stays_until_that_is_off(tmp_path):
    from dataclasses import replace
    from sdlearn import load_sd
    from sdlearn.adapt.lora import merge_lora, save_lora
    sd = load_sd(networks='own')
    base = {k: v.clone() for k, v in sd.unet.state_dict().items()}
    def is_base(): return all(torch.equal(v, base[k]) for k, v in sd.unet.state_dict().items())
    first, second = (_some_lora(sd.unet, n) for n in (1, 2))
    undo_first, undo_second = merge_lora(first, unet=sd.unet), merge_lora(second, unet=sd.unet)
    with pytest.raises(ValueError, match='the last goes first'): undo_first()
    undo_second()
    undo_first()
    assert is_base()
    files = [save_lora(p, tmp_path/f'{i}.safetensors') for i, p in enumerate((first, second))]
    sd.load_lora(files[0])
    other = replace(sd, guidance_scale=3.)
    other.load_lora(files[1])
    with pytest.raises(ValueError, match='the last goes first'): sd.unload()
    other.unload()
    sd.unload()
    assert is_base() and not sd.undo

def test_a_word_is_not_found_in_a_longer_one(tmp_path):
    from sdlearn import load_sd
    from sdlearn.adapt.inversion import save_word
    vectors = dict(badhand=2, badhandv4=3, badhandv5=1)
    for w, n in vectors.items(): save_word(tmp_path/f'{w}.safetensors', w, torch.randn(n, 128))
    for order in (['badhand', 'badhandv4', 'badhandv5'], ['badhandv5', 'badhandv4', 'badhand']):
        sd = load_sd(networks='own')
        for w in order: sd.load_word(tmp_path/f'{w}.safetensors')
        def said(text): return sd.tokenizer.convert_ids_to_tokens(sd.tokenizer(text).input_ids)[1:-1]
        for w, n in vectors.items():
            spread = [w, *(f'{w}_{i}' for i in range(1, n))]
            assert said(w)==said(w.upper())==said(' '.join(spread))==spread
        assert said('a BadHand, badhandv4')==['a</w>', 'badhand', 'badhand_1', ',</w>', 'badhandv4', 'badhandv4_1', 'badhandv4_2']
    ids = sd.tokenizer('a badhand cat').input_ids
    assert sd.tokenizer.decode(ids, skip_special_tokens=True)=='a badhand badhand_1 cat'
    fox = sd.tokenizer.bpe('fox')
    fox.append(7)
    assert sd.tokenizer.bpe('fox')==fox[:-1]

def test_names_with_capitals_are_found_in_a_checkpoint_of_diffusers(tmp_path):
    from sdlearn import load_sd
    from sdlearn.tokenizer import Tokenizer
    folder = tmp_path/'tokenizer'
    shutil.copytree(package/'checkpoint'/'tokenizer', folder)
    for file in ('tokenizer.json', 'special_tokens_map.json'): (folder/file).unlink(missing_ok=True)
    said = json.loads((folder/'tokenizer_config.json').read_text())
    said['added_tokens_decoder'] = {'49408': dict(content='<Herge>', lstrip=False, normalized=True, rstrip=False, single_word=False, special=False)}
    (folder/'tokenizer_config.json').write_text(json.dumps(said))
    ours = Tokenizer.from_folder(folder)
    for text in ('a <Herge> cat', 'a <herge> cat'): assert 49408 in ours(text).input_ids
    assert ours.encode('a <Herge> cat', clean=False)[2]==49408

@pytest.mark.parametrize('networks', ['own', 'diffusers'])
def test_nothing_is_remembered_of_other_weights_or_words(networks):
    from sdlearn import load_sd
    from sdlearn.adapt.lora import merge_lora
    from sdlearn.denoiser import noise_predictor
    from sdlearn.pipeline import encode_prompt
    sd = load_sd(networks=networks)
    emb, other = encode_prompt(sd, ['a cat']), encode_prompt(sd, ['a dog'])
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = noise_predictor(sd, emb)
        before = kept(x, 5., 500)
        undo = merge_lora(_some_lora(sd.unet, 1), unet=sd.unet)
        after = kept(x, 5., 500)
        torch.testing.assert_close(after, noise_predictor(sd, emb)(x, 5., 500))
        assert (after-before).abs().max()>.01
        undo()
        torch.testing.assert_close(kept(x, 5., 500), before)
        emb.copy_(other)
        torch.testing.assert_close(kept(x, 5., 500), noise_predictor(sd, other)(x, 5., 500))

def test_a_watch_sees_what_is_written_exchanged_and_hung_on():
    from torch import nn
    from sdlearn import load_sd
    from sdlearn.unet import Watch
    net, words = load_sd(networks='own').unet, torch.zeros(1, 77, 128)
    watch = Watch(net)
    def changed(): return watch.changed(words), watch.changed(words)
    assert changed()==(True, False)
    layer, hooks = net.mid_block.resnets[0], []
    def write():
        with torch.no_grad(): layer.conv1.weight.mul_(2)
    def exchange(): layer.conv1.bias = nn.Parameter(layer.conv1.bias.clone())
    def replace(): layer.conv2 = nn.Conv2d(4, 4, 3)
    def hang(): hooks.append(layer.register_forward_hook(lambda *args: None))
    def listen(): hooks.append(layer.norm1.register_forward_pre_hook(lambda *args: None))
    for change in (write, exchange, replace, hang, listen,
                   lambda: hooks.pop().remove(), lambda: words.add_(1), net.half, net.float):
        change()
        assert changed()==(True, False), change
    hook = layer.register_forward_hook(lambda *args: None)
    watch.changed(words)
    for _ in range(20):     # hooks that come and go, often where others have been
        hook.remove()
        hook = layer.register_forward_hook(lambda *args: None)
        assert changed()==(True, False)
    for _ in range(20):     # words, too
        words = torch.zeros(1, 77, 128)
        assert changed()==(True, False)

def test_hooks_and_layers_of_ones_own_are_asked_when_it_draws():
    from sdlearn import load_sd
    from sdlearn.unet import Attention, prepare
    unet, called = load_sd(networks='own').unet, []
    attention = next(m for n, m in unet.named_modules() if n.endswith('attn1'))
    hook = attention.to_q.register_forward_hook(lambda *args: called.append(1))
    asked = torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 77, 128)
    with torch.no_grad(): plain = prepare(unet)(*asked)
    hook.remove()
    assert called==[1]
    hook = attention.to_q.register_forward_pre_hook(lambda *args: called.append(2))
    with torch.no_grad(): prepare(unet)(*asked)
    hook.remove()
    assert called==[1, 2]
    class Mine(torch.nn.Linear):
        def forward(self, x): return super().forward(x)+1
    attention.to_v.__class__ = Mine
    with torch.no_grad(): assert (prepare(unet)(*asked)-plain).abs().max()>1e-3
    class Own(Attention):
        def forward(self, x, context=None): return super().forward(x, context)+1
    attention.__class__ = Own
    with torch.no_grad(): assert_close(prepare(unet)(*asked), unet(*asked), rtol=1e-3, atol=1e-3)

def test_a_student_is_one_once_and_draws_by_its_own_rule(tmp_path):
    import diffusers
    from sdlearn import load_sd
    from sdlearn.fast.student import student_file
    from sdlearn.load import scheduler_config
    from sdlearn.pipeline import plan_for
    student = load_sd(networks='own', fast=True)
    student.save(tmp_path/'st')
    with pytest.raises(ValueError, match='a student already'):
        load_sd(tmp_path/'st', networks='own', fast=package/'checkpoint'/'fast'/student_file)
    def made(kind): return getattr(diffusers, kind).from_config(scheduler_config, timestep_spacing='trailing')
    assert plan_for(student, made('EulerDiscreteScheduler')).timesteps==plan_for(student).timesteps
    for kind in ('EulerAncestralDiscreteScheduler', 'DDPMScheduler', 'DDIMScheduler', 'DPMSolverMultistepScheduler'):
        with pytest.raises(ValueError, match='made for'): plan_for(student, made(kind))

def test_paths_of_another_teacher_are_refused(tmp_path):
    from dataclasses import replace
    from sdlearn import load_sd
    from sdlearn.fast.student import Made, write_paths
    sd, how = load_sd(networks='own'), dict(folder=tmp_path/'p', made=Made(1))
    write_paths(sd, ['a cat'], **how)
    sd.unet.requires_grad_(True)
    write_paths(sd, ['a cat'], **how)      # whether it learns makes no other paths
    sd.unet.requires_grad_(False)
    with pytest.raises(ValueError, match='something else'):
        write_paths(replace(sd, schedule=replace(sd.schedule, prediction_type='v_prediction')), ['a cat'], **how)
    for net in (sd.text_encoder, sd.unet):
        p = next(net.parameters())
        with torch.no_grad(): p.mul_(2)
        with pytest.raises(ValueError, match='something else'): write_paths(sd, ['a cat'], **how)
        with torch.no_grad(): p.div_(2)

def test_a_seed_is_the_same_in_double_precision():
    from sdlearn import load_sd, txt2img
    from sdlearn.core import seeded_noise
    sd, how = load_sd(networks='own'), dict(num_inference_steps=2, seed=3, progress=False)
    plain, noise = txt2img(sd, 'a cat', **how)[0], seeded_noise((2,), [1])
    torch.set_default_dtype(torch.float64)
    try: other, again = txt2img(sd, 'a cat', **how)[0], seeded_noise((2,), [1])
    finally: torch.set_default_dtype(torch.float32)
    assert torch.equal(noise, again) and np.abs(np.asarray(plain, int)-np.asarray(other, int)).max()<=1

def test_a_checkpoint_is_saved_from_where_it_came(tmp_path, monkeypatch):
    from sdlearn import load_sd
    from sdlearn.adapt.lora import put_lora, take_lora
    load_sd(networks='own').save(tmp_path/'mine')
    said = tmp_path/'mine'/'scheduler'/'scheduler_config.json'
    said.write_text(said.read_text().replace('DPMSolverMultistepScheduler', 'DDIMScheduler'))
    monkeypatch.chdir(tmp_path)
    sd = load_sd('mine', networks='own')
    monkeypatch.chdir(tmp_path.parent)
    sd.save(tmp_path/'b')
    assert 'DDIMScheduler' in (tmp_path/'b'/'scheduler'/'scheduler_config.json').read_text() and (tmp_path/'b'/'clip').is_dir()
    put_lora(sd.unet)
    with pytest.raises(ValueError, match='LowRank layers'): sd.save(tmp_path/'c')
    take_lora(sd.unet)
    shutil.rmtree(tmp_path/'mine')
    with pytest.raises(ValueError, match='to be there still'): sd.save(tmp_path/'c')
    assert not (tmp_path/'c').exists()

def test_files_of_a_package_that_is_read_only_can_be_saved_and_deleted(tmp_path):
    from sdlearn.load import _copy_files
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'x.json').write_text('{}')
    (tmp_path/'a'/'x.json').chmod(0o444)
    (tmp_path/'a').chmod(0o555)
    try: _copy_files(tmp_path/'a', tmp_path/'b')
    finally: (tmp_path/'a').chmod(0o755)
    assert (tmp_path/'b').stat().st_mode&0o200 and (tmp_path/'b'/'x.json').stat().st_mode&0o200

def test_diffusers_reads_what_it_saved_with_a_word(tmp_path):
    import diffusers
    from sdlearn import load_sd
    from sdlearn.adapt.inversion import save_word
    sd = load_sd()
    sd.load_word(save_word(tmp_path/'w.safetensors', '<tiny>', torch.randn(2, 128)))
    pieces = dict(vae=sd.vae, text_encoder=sd.text_encoder, tokenizer=sd.tokenizer, unet=sd.unet,
                  safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    from sdlearn.load import scheduler_config
    pipe = diffusers.StableDiffusionPipeline(scheduler=diffusers.DDIMScheduler.from_config(scheduler_config), **pieces)
    pipe.save_pretrained(tmp_path/'pp')
    assert json.loads((tmp_path/'pp'/'model_index.json').read_text())['tokenizer'][0]=='transformers'
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path/'pp', safety_checker=None)
    assert back.tokenizer('a <tiny>').input_ids[2]==49408

def test_a_word_goes_on_learning_after_its_checkpoint_has_moved(tmp_path):
    from dataclasses import replace
    from sdlearn import load_sd
    from sdlearn.adapt.inversion import word_loss
    from sdlearn.train import fingerprint
    sd, latents, ids = load_sd(networks='own'), torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, 77, dtype=torch.long)
    def mark(sd): return fingerprint(word_loss(sd, latents, ids))
    assert mark(sd)==mark(replace(sd, path=tmp_path, guidance_scale=3.))
    assert mark(sd)!=mark(replace(sd, schedule=replace(sd.schedule, prediction_type='v_prediction')))

def test_word_maps_of_every_side(tmp_path):
    from sdlearn.attention import word_map
    def half(n): return -(-n//2)
    for h, w in itertools.product(range(1, 25), repeat=2):
        sides = (h, w), (half(h), half(w)), (half(half(h)), half(half(w)))
        maps = {str(i): torch.rand(1, 2, a*b, 77) for i, (a, b) in enumerate(sides)}
        assert word_map(maps, [2], (8*h, 8*w)).shape==(8*h, 8*w)
    upright = torch.zeros(9, 3)
    upright[0] = 1
    found = word_map(dict(a=upright.reshape(1, 1, 27, 1).expand(1, 2, 27, 77)), [2], (136, 40))
    assert found[:10].min()>.5 and found[40:].max()<.01
    wide = torch.zeros(4, 8)        # of a size whose latents say nothing: by its proportions
    wide[-1] = 1
    found = word_map(dict(a=wide.reshape(1, 1, 32, 1).expand(1, 2, 32, 77)), [2], (60, 120))
    assert found[-6:].min()>.9 and found[:30].max()<.01

def test_a_strength_that_is_recommended_is_enough():
    from sdlearn.pipeline import start_step
    for n in range(1, 1001):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            start_step(n, 1e-5)
        least = float(re.search(r'Take ([\d.]+) or more', str(said[0].message))[1])
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert start_step(n, min(least, 1.))<n

def test_whatever_stands_for_a_unet_has_parameters():
    from types import SimpleNamespace
    from sdlearn.folders import pocket_path, read_json
    from sdlearn.fast.cache import FeatureCache
    from sdlearn.fast.export import OnnxUNet, _Pixels
    from sdlearn.fast.decoder import load_small
    from sdlearn.sample import make_plan
    from sdlearn.unet import UNet
    unet = UNet(read_json(pocket_path()/'unet'/'config.json'))
    assert next(iter(FeatureCache(unet, make_plan('euler', 3)).parameters())).dtype==torch.float32
    assert next(OnnxUNet.parameters(SimpleNamespace())).device.type=='cpu'
    small = load_small()
    z = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(_Pixels(small)(z), small.decoder(z))

def test_who_steers_an_inpainting_moves_nothing_that_is_kept():
    from sdlearn import inpaint, load_sd
    sd, image = load_sd(networks='own'), Image.effect_noise((64, 64), 40).convert('RGB')
    hole = Image.new('L', (64, 64))
    hole.paste(255, (0, 0, 64, 16))
    ends, how = [], dict(num_inference_steps=2, seed=1, progress=False)
    def steering(by):
        def shove(step):
            step.x_next = step.x_next+by
            if step.i==1: ends.append(step)
        return shove
    for by in (0, 3): inpaint(sd, 'a cat', image, hole, on_step=steering(by), **how)
    plain, steered = (step.x_next for step in ends)
    assert torch.equal(plain[:, :, 2:], steered[:, :, 2:]) and (steered-plain)[:, :, :2].mean()>1
    with pytest.raises(ValueError, match='on_step'): inpaint(sd, 'a cat', image, hole, on_step=5, **how)

def test_the_command_says_a_thing_once_and_knows_its_model(tmp_path, monkeypatch, capsys):
    from sdlearn import load_sd
    from sdlearn.cli import _model_name, _pictures_in, main
    monkeypatch.chdir(tmp_path)
    (tmp_path/'pocket').mkdir()
    assert _model_name(None)=='pocket' and _model_name('pocket')=='another pocket'
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    (tmp_path/'notes.pdf').write_bytes(b'%PDF-1.4')
    assert len(_pictures_in(str(tmp_path)))==1
    small = ['--steps', '1', '--height', '16', '--width', '16', '--seed', '1']
    assert main(['a quark', '--n', '6', *small, '-o', 'q.png'])==0
    assert capsys.readouterr().err.count('never seen')==1
    assert main(['a fox', '--fast', '--seed', '1', '-o', 'f.png'])==0
    assert main(['--again', 'f.png', '--no-fast', *small, '-o', 'g.png'])==0

def test_latents_of_other_pictures_are_not_taken(tmp_path):
    from sdlearn.pocket.codec import cache_latents
    from sdlearn.vae import VAE
    vae = VAE(tiny_vae)
    pictures = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)).astype('uint8')
    once = cache_latents(vae, pictures, tmp_path)
    assert torch.equal(cache_latents(vae, pictures, tmp_path), once)
    with pytest.raises(ValueError, match='something else'): cache_latents(vae, 255-pictures, tmp_path)

def test_words_of_another_unet_or_start_are_not_gone_on_with(tmp_path):
    import copy
    from sdlearn.adapt.imagic import learn_sentence
    from sdlearn.adapt.lora import lora_loss
    net = small_unet()
    start, latents = torch.randn(1, 77, 12), torch.randn(1, 4, 8, 8)
    loss, path, kw = lora_loss(latents, start, 2), tmp_path/'words.pt', dict(progress=False)
    found = learn_sentence(net, loss, start, 2, path, **kw)
    assert torch.equal(learn_sentence(net, loss, start, 2, path, **kw), found)
    other = copy.deepcopy(net)
    with torch.no_grad(): other.conv_in.weight.mul_(.9)
    for args in ((other, loss, start), (net, loss, start+1)):
        with pytest.raises(ValueError, match='of this training'): learn_sentence(*args, 2, path, **kw)

def test_left_is_not_right_for_a_judge_of_pixels():
    from sdlearn.pocket.captions import Scene
    from sdlearn.pocket.evaluate import by_pixels
    from sdlearn.pocket.scenes import draw
    for i, name in enumerate(('fox', 'car', 'rose', 'otter', 'parrot', 'duck')):
        for side in ('left', 'right'):
            both = [Scene(name, place=p) for p in ('left', 'right')]
            assert by_pixels([draw(Scene(name, place=side, seed=i))], [both])[0].place==side, (name, side)

def test_a_subject_is_itself_by_whatever_name():
    from sdlearn.pocket.captions import Scene
    from sdlearn.pocket.evaluate import rivals
    for name, n in (('cat', 763), ('kitten', 763), ('moose', 764)):
        assert Scene(name) in (found := rivals(Scene(name), 'subject')['subject']) and len(found)==n
    for s in (Scene('kitten', relation='riding', other='horse'), Scene('dog', relation='and', other='kitten')):
        for question, found in rivals(s, 'relation').items(): assert s in found and len({*found})==(2 if 'swapped' in question else 120)

def test_an_evaluation_counts_before_it_draws(monkeypatch):
    from sdlearn.pocket import evaluate as e
    monkeypatch.setattr(e, 'load_sd', lambda *args, **kw: 1/0)
    for change, said in ((dict(vae=3), "n\\['vae'\\] as a whole number of 4 or more, got 3"), (dict(guided=0), '1 or more, got 0'),
                         (dict(stepped=2.), 'whole number'), (dict(held=60), 'at most .* held-out scenes of count')):
        with pytest.raises(ValueError, match=said): e.evaluate(n=e.few|change)
    for n in (e.few, e.many):
        with pytest.raises(ZeroDivisionError): e.evaluate(n=n)

def test_a_card_with_missing_numbers(tmp_path):
    from sdlearn.pocket.card import facts, model_card, update_facts
    update_facts(tmp_path, metrics=dict(shares={}))
    with pytest.raises(ValueError, match='how many subjects .* update_facts'): model_card(tmp_path)
    known = facts()['metrics']
    for lost in known:
        update_facts(tmp_path, subjects=3, metrics={k: v for k, v in known.items() if k!=lost})
        assert '3 subjects' in model_card(tmp_path)

def test_a_student_draws_class_pictures_in_its_own_steps(monkeypatch):
    from types import SimpleNamespace
    from sdlearn import pipeline
    from sdlearn.adapt import dreambooth, which
    asked = []
    def drawn(sd, prompts, **how): return asked.append(how.get('num_inference_steps')) or prompts
    monkeypatch.setattr(pipeline, 'txt2img', drawn)
    for folded in (4., None):
        sd = SimpleNamespace(folded=folded)
        dreambooth.class_pictures(sd, 'a deer', 1)
        which.draw_taught(sd, which.untaught, ['a deer'])
    assert asked==[None, None, 12, 12]

def test_what_a_student_of_single_steps_cannot_be_made_for():
    from sdlearn.fast.student import Made, between, path_loss, whole_path_loss
    from sdlearn.schedule import SD_V1
    paths, words = torch.randn(1, 5, 4, 8, 8), torch.randn(1, 77, 12)
    for spacing in ('linspace', 'leading'):
        with pytest.raises(ValueError, match="'trailing', which leaves room"): between(Made(timestep_spacing=spacing).plan(), (4, 3, 3, 3), SD_V1)
    for name in ('dpmpp_2m', 'ddpm', 'lms'):
        with pytest.raises(ValueError, match='a plan of euler'): path_loss(paths, words, Made(sampler=name).plan())
    for name in ('heun', 'pndm'):
        with pytest.raises(ValueError, match='once per step'): whole_path_loss(paths, words, Made(sampler=name).plan())
    for name in ('euler', 'ddim'): path_loss(paths, words, Made(sampler=name).plan())

@torch.no_grad()
def test_a_guided_teacher_is_asked_at_a_number_too():
    torch.manual_seed(0)
    from sdlearn.fast.progressive import guided_teacher, two_steps
    net, words, x = small_unet(), torch.randn(1, 77, 12), torch.randn(2, 4, 8, 8)
    for scale in (1., 3.):
        ask = guided_teacher(net, words*.1, scale)
        one, each = (two_steps(ask, x, [9., 3., 1.], ts, words.expand(2, -1, -1)) for ts in ((900, 500), (torch.tensor([900]*2), torch.tensor([500]*2))))
        assert_close(one, each, rtol=1e-3, atol=1e-3)

def test_a_page_finds_words_with_capitals_and_takes_its_own_seed(js, own):
    from dataclasses import replace
    from sdlearn import load_sd
    from sdlearn.adapt.inversion import with_words
    from sdlearn.page import loading_line, page_settings, tokenizer_settings
    from sdlearn.tokenizer import tokenize
    more, texts = with_words(own.tokenizer, ['<Herge>', '<Two>', '<Two>_1']), ['a <Herge> cat', 'a <two> cat', '<Two> <Two>_1']
    told = js(page_reads, texts=texts, said=tokenizer_settings(more))
    for text, got in zip(texts, told): assert got['ids']==tokenize(more, [text])[0].tolist(), text
    student = load_sd(networks='own', fast=True)
    assert heard(lambda: page_settings(student, 'a', 2**32+5, 'sketch')) and page_settings(student, 'a', 2**32+5, 'sketch')['seed']==5
    assert loading_line(student) and loading_line(replace(student, num_inference_steps=8)) is None

def test_a_checkpoint_does_not_take_its_run_away(tmp_path):
    from dataclasses import replace
    from sdlearn.pocket.recipe import claim, tiny, train
    for out in (tmp_path/'a', tmp_path, tmp_path/'a'/'..'/'a'):
        with pytest.raises(ValueError, match='does not hold the run'): train(tmp_path/'a', out, tiny)
    assert not (tmp_path/'a').exists()
    nets = [torch.nn.Linear(1, 1)]
    for n in (3, np.int64(3)): claim(tmp_path/'run', replace(tiny, unet_steps=n), nets)

def test_a_drawing_that_is_not_flat_keeps_its_proportions():
    from sdlearn.adapt.finetune import on_white
    for size, want in (((100, 50), (50, 100)), ((50, 100), (100, 50)), ((70, 70), (100, 100))):
        dark = np.asarray(on_white(Image.new('RGB', size, 'black')))[..., 0]<128
        assert (dark.any(1).sum(), dark.any(0).sum())==want

def test_torchs_own_numbers_are_others_than_the_generators():
    from sdlearn.train import train_steps
    seen, w = [], torch.nn.Parameter(torch.zeros(1))
    def loss(g):
        seen.append((torch.randn(4, generator=g), torch.randn(4)))
        return w.square().sum()
    for _ in range(2):
        for step in train_steps(loss, [w], 2): pass
    assert all(not torch.equal(a, b) for a, b in seen) and all(torch.equal(*both) for a, b in zip(seen[:2], seen[2:]) for both in zip(a, b))

@torch.no_grad()
def test_a_cache_takes_nothing_of_a_drawing_that_was_given_up():
    torch.manual_seed(0)
    from sdlearn.fast.cache import FeatureCache
    net, plan, words = small_unet(), make_plan('ddim', 9), torch.randn(2, 7, 12)
    x, y, cache = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), FeatureCache(net, plan, 3)
    for t in plan.timesteps[:2]: cache(y, t, words)
    assert_close(cache(x, plan.timesteps[4], words), net(x, plan.timesteps[4], words), rtol=1e-3, atol=1e-3)

def test_a_judge_in_double_precision():
    from sdlearn.judge import _read_clip, scores
    right = scores([Image.new('RGB', (64, 64))], ['a cat'])
    _read_clip.cache_clear()
    torch.set_default_dtype(torch.float64)
    try: assert_close(scores([Image.new('RGB', (64, 64))], ['a cat']), right)
    finally:
        torch.set_default_dtype(torch.float32)
        _read_clip.cache_clear()

def test_pictures_of_rare_kinds_are_saved(tmp_path):
    from sdlearn.infotext import save_picture
    for mode in ('I', 'F', 'CMYK', 'HSV', 'YCbCr', 'LA', 'RGBA', 'P', '1', 'I;16'):
        for end in ('png', 'jpg', 'jfif', 'webp', 'gif', 'bmp'): save_picture(Image.new(mode, (8, 8)), tmp_path/f'a.{end}', dict(prompt='x'))
    assert Image.open(tmp_path/'a.png').mode in ('I;16', 'I')      # as Pillow 10.1 reads it

def test_the_worst_pixel_of_a_small_picture():
    from sdlearn.pocket.codec import worst
    x = torch.zeros(1, 3, 8, 8)
    y = x.clone()
    y[..., 2, 3] = .5
    assert_close(worst(y, x), torch.tensor(.5))

def test_digits_are_found_in_a_home_folder(tmp_path, monkeypatch):
    from sdlearn.idea.score import digits
    for name in ('HOME', 'USERPROFILE'): monkeypatch.setenv(name, str(tmp_path))
    np.savez(tmp_path/'m.npz', x_train=np.zeros((20, 8, 8), 'uint8'), y_train=np.arange(20)%10)
    assert len(digits('~/m.npz', held_out=5)[0])==15

def test_the_card_says_what_held_out_means():
    from sdlearn.pocket.card import model_card
    from sdlearn.pocket.scenes import is_held_out, scene
    from sdlearn.pocket.captions import Scene
    s = scene(5)                    # the second subject in a colour that is held out for it
    assert not is_held_out(s) and is_held_out(Scene(s.other, color=s.other_color))
    assert 'the second of two may have been seen so' in ' '.join(model_card().split())
    assert 'a second one may be seen' in is_held_out.__doc__

def test_an_evaluation_asks_for_its_judge_first(tmp_path, monkeypatch):
    from sdlearn.pocket import evaluate as e
    shutil.copytree(package/'checkpoint', tmp_path/'c', ignore=shutil.ignore_patterns('clip', 'fast'))
    monkeypatch.setattr(e, 'draw_all', lambda *args, **kw: 1/0)
    with pytest.raises(ValueError, match='with clip/'): e.evaluate(tmp_path/'c', n=e.few)

def test_a_saved_bundle_keeps_its_steps_and_sampler(tmp_path):
    from dataclasses import replace
    from sdlearn import load_sd
    from sdlearn.pipeline import plan_for
    sd = replace(load_sd(networks='own'), num_inference_steps=7, sampler='ddim', guidance_scale=3.)
    there = load_sd(sd.save(tmp_path/'mine'), networks='own')
    assert (there.num_inference_steps, there.sampler, there.guidance_scale)==(7, 'ddim', 3.)
    assert plan_for(there)==plan_for(sd)!=plan_for(load_sd(networks='own'))
    import diffusers
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path/'mine', use_safetensors=True)

def test_python_ends_well_while_an_explorer_paints():
    code = """
import time, torch
from sdlearn.explore import Painter
def draw():
    while True:
        for _ in range(20): torch.randn(400, 400)@torch.randn(400, 400)
        yield None
many = [Painter(draw, lambda p: None, print, rest=0) for _ in range(4)]
for p in many: p.ask()
time.sleep(.3)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|{'PYTHONPATH': str(root)})
    assert done.returncode==0 and not done.stderr, done.stderr      # it aborted: 134

def test_words_are_mixed_before_they_are_read():
    from sdlearn import load_sd
    from sdlearn.explore import _one_text
    from sdlearn.text import embed_prompts
    sd = load_sd(networks='own')
    ends = embed_prompts(sd.tokenizer, sd.text_encoder, ['a picture of a puppy', 'a picture of a cat'])
    with torch.no_grad():
        first, half, last = (_one_text(sd, 'a picture of a puppy', 'a picture of a cat', w) for w in (0, .5, 1))
        assert_close(first, ends[0], rtol=1e-4, atol=1e-4)
        assert_close(last, ends[1], rtol=1e-4, atol=1e-4)
        assert (half-(first+last)/2).abs().max()>.05                # read as one text, not two texts in between
        assert torch.equal(_one_text(sd, 'a (picture:1.3) of a puppy', 'a picture of a cat', .5), half)
        with pytest.raises(ValueError, match='as many tokens, got 2 and 3'): _one_text(sd, 'a cat', 'a big cat', .5)

# ---------------------------------------------------------------- errors of the field

def test_two_steps_in_one_turn_of_a_scheduler_are_no_way_to_see_x0():
    import diffusers
    from sdlearn.load import scheduler_config
    from sdlearn.schedule import add_noise
    kinds = ('LMSDiscrete', 'EulerDiscrete', 'HeunDiscrete', 'DPMSolverMultistep', 'UniPCMultistep', 'PNDM')
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    def end(kind, twice): # the notes call `step` a second time for its `pred_original_sample`
        scheduler = getattr(diffusers, f'{kind}Scheduler').from_config(scheduler_config)
        scheduler.set_timesteps(10)
        x, asked = add_noise(x0, noise, sigma_at(scheduler.timesteps[0].item())), []
        x = x/x.std()*float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            eps = scheduler.scale_model_input(x, t)*.1
            if twice: scheduler.step(eps, t, x)
            x = scheduler.step(eps, t, x).prev_sample
        return x
    stopped = []
    for kind in kinds:
        once = end(kind, False)
        try: twice = end(kind, True)
        except Exception: stopped.append(kind)                          # an error
        else: assert not torch.allclose(twice, once, atol=1e-3), kind   # or, without a word, another picture
    assert len(stopped)>=3, stopped

def test_nothing_is_called_that_is_gone_from_the_libraries():
    gone = ('decoder.get(', 'unet.in_channels', 'init_image', 'batch_encode_plus', '.text_model(', 'causal_attention_mask=',
            'randint(0, 999', 'test_close', 'test_eq')
    for path in package.rglob('*.py'):
        text = path.read_text(encoding='utf8')
        for name in gone: assert name not in text, f'{path.name} has {name}'

traps = { # DESIGN.md's list of what goes wrong elsewhere -> where it is tested: here, in a lesson, or by `.ci/exercises`
    1: ['test_text_encoder_equals_transformers'],
    2: ['test_two_steps_in_one_turn_of_a_scheduler_are_no_way_to_see_x0'],
    3: ['35_unet: test_trap_3_scaled', '34_schedule: test_unet_input_is_scaled'],
    4: ['test_nothing_is_called_that_is_gone_from_the_libraries', '39_deep_dive: batch_encode_plus'],
    5: ['34_schedule: test_every_timestep_is_trained', 'test_timesteps_spread_over_a_batch'],
    6: ['36_guidance: trap_6_ends', 'test_guidance_leans_the_right_way'],
    7: ['test_masks_are_black_or_white_and_the_start_is_counted_as_diffusers_does',
        'test_strength_0_gives_the_picture_back_and_looks_at_everything'],
    8: ['33_vae: test_trap_8_square_stays'],
    9: ['test_package_stands_without_the_development_tools', 'test_modules_are_what_the_notebooks_export'],
    10: ['test_nothing_is_called_that_is_gone_from_the_libraries'],
    11: ['test_what_is_cut_is_said_in_a_line', 'test_a_prompt_that_just_fits_is_not_said_to_be_cut'],
    12: ['33_vae: test_trap_12_overflow', 'test_a_decoder_that_overflows_is_asked_again_in_full'],
    13: ['test_fresh_noise_goes_on_from_the_generator_of_the_start'],
    14: ['test_what_we_do_not_know_is_refused_by_name', 'test_every_setting_of_a_network_is_obeyed_or_refused',
         'test_a_vaes_own_scale_is_obeyed'],
    15: ['test_pictures_are_taken_as_people_see_them', 'test_pixels_of_another_range_are_not_guessed_at'],
    16: ['test_the_recipes_losses', 'test_the_autoencoders_loss', 'test_a_tenth_of_the_captions_is_empty', 'test_noise_loss'],
    17: ['.ci/exercises']}

def test_each_trap_has_its_test():
    assert [*traps]==[*range(1, 18)]
    for name in (n for names in traps.values() for n in names):
        lesson, _, said = name.partition(': ')
        if said: assert said in (root/'nbs'/f'{lesson}.ipynb').read_text(encoding='utf8'), name
        else: assert name in globals() or (root/name).exists(), name

def test_explorers_see_a_lora_that_is_put_on_later():
    from sdlearn import explore, load_sd
    from sdlearn.adapt.lora import merge_lora
    sd = load_sd(networks='own')
    reel = explore.film(sd, steps=2)
    def shown(step):
        reel.controls['step'].value = step
        reel.painter.settle()
        return reel.picture.value
    before = shown(0), shown(1)
    undo = merge_lora(_some_lora(sd.unet, 1), unet=sd.unet)
    assert shown(0)!=before[0]
    undo()
    assert (shown(1), shown(0))==before[::-1]
    with torch.no_grad(): next(sd.text_encoder.parameters()).mul_(1.1)
    assert shown(1)!=before[1]                      # the words are another's, too

def test_a_canvas_writes_down_what_its_brush_is_now():
    from sdlearn import explore
    brush = [2, -1.]
    canvas = explore.Canvas(3, lambda: brush, [(0, 0, 1, 2.)])
    canvas.buttons[5].click()                       # of three rows, the second; its last place
    brush[:] = 3, .5
    canvas.buttons[6].click()
    assert canvas.value==((0, 0, 1, 2.), (1, 2, 2, -1.), (2, 0, 3, .5))
    canvas.clear.click()
    assert canvas.value==()

def test_words_that_older_transformers_added_are_read(tmp_path):
    from sdlearn.folders import pocket_path
    from sdlearn.tokenizer import Tokenizer
    for name in ('vocab.json', 'merges.txt'): shutil.copyfile(pocket_path()/'tokenizer'/name, tmp_path/name)
    (tmp_path/'tokenizer_config.json').write_text('{"model_max_length": 77}')
    (tmp_path/'added_tokens.json').write_text('{"<cat-toy>": 49408}')
    assert Tokenizer.from_folder(tmp_path).encode('a <cat-toy>')==[49406, 320, 49408, 49407]

def test_words_that_transformers_saves_beside_old_files_are_read(tmp_path):
    from transformers import CLIPTokenizer
    from sdlearn.folders import pocket_path
    from sdlearn.tokenizer import Tokenizer
    for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json'):
        shutil.copyfile(pocket_path()/'tokenizer'/name, tmp_path/name)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(['<tiny>'])
    theirs.save_pretrained(tmp_path)        # transformers 5 writes tokenizer.json, and leaves the other two
    assert Tokenizer.from_folder(tmp_path).encode('a <tiny>')==[49406, 320, 49408, 49407]==theirs('a <tiny>').input_ids

def test_a_bundle_that_does_not_know_the_words_of_its_encoder_says_so(tmp_path):
    from sdlearn.adapt.inversion import save_word
    from sdlearn.text import embed_prompts
    sd, *_ = _asked()
    other = replace(sd)
    sd.load_word(save_word(tmp_path/'w.safetensors', '<x>', torch.randn(1, 128)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        embed_prompts(sd.tokenizer, sd.text_encoder, 'a fox')
    with pytest.warns(UserWarning, match='knows 1 words'): embed_prompts(other.tokenizer, other.text_encoder, 'a fox')
    sd.unload()

def test_explorers_see_other_settings():
    from sdlearn import explore
    sd, *_ = _asked()
    for make in (explore.film, explore.words):
        sd.guidance_scale = 4.
        one = make(sd, 'a fox', steps=2)
        one.painter.settle()
        before, sd.guidance_scale = one.picture.value, 9.
        step = one.controls['step']
        for _ in range(2): # there and back
            step.value = step.min+step.max-step.value
            one.painter.settle()
        assert one.picture.value!=before

def test_torchs_default_device_matters_to_nobody():
    from sdlearn import load_sd, txt2img
    from sdlearn.adapt.inversion import spread_timesteps
    from sdlearn.schedule import _known, random_timesteps
    how = dict(num_inference_steps=1, seed=1, height=32, width=32, progress=False)
    before = txt2img(load_sd(networks='own'), 'a (red:1.3) fox', **how)[0]
    _known.cache_clear()
    torch.set_default_device('meta')        # as 'cuda' does, it refuses what lies elsewhere
    try:
        assert txt2img(load_sd(networks='own'), 'a (red:1.3) fox', **how)[0]==before
        g = torch.Generator().manual_seed(0)
        assert {random_timesteps(3, g).device.type, spread_timesteps(3, g).device.type}=={'cpu'}
    finally: torch.set_default_device(None)

def test_a_bundle_is_whole_when_loaded_in_inference_mode():
    from sdlearn import load_sd
    with torch.inference_mode(): sd = load_sd(networks='own', fast=True)
    assert not any(p.is_inference() for p in sd.unet.parameters())

def test_a_training_without_gradients_says_so():
    from sdlearn.train import fit
    net = torch.nn.Linear(1, 1)
    with torch.no_grad(), pytest.raises(ValueError, match='gradients.*no_grad'):
        fit(net, lambda net, g: net(torch.ones(1)).sum(), 1, progress=False)

def test_what_goes_into_another_process_is_pickled_or_refused_in_a_sentence():
    from sdlearn import load_sd
    from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
    from sdlearn.adapt.inversion import with_words
    from sdlearn.fast.consistency import lcm_plan
    from sdlearn.sample import make_plan, noise_from, sample, samplers
    for name in samplers:
        plan = pickle.loads(pickle.dumps(make_plan(name, 5)))
        assert plan==make_plan(name, 5) and plan.calls==make_plan(name, 5).calls
    plan = pickle.loads(pickle.dumps(lcm_plan(4)))
    assert plan==lcm_plan(4) and plan.calls==4
    for theirs in (EulerDiscreteScheduler, HeunDiscreteScheduler, EulerAncestralDiscreteScheduler):
        made = make_plan(theirs(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear'), 5)
        late, again = made.after(2), pickle.loads(pickle.dumps(made.after(2)))
        assert again[1:4]==late[1:4] and again.calls==late.calls and made.calls-late.calls==2*made.rule.scheduler.order
        ends = []
        for p in (late, again):
            g, x = torch.Generator().manual_seed(0), torch.ones(1, 4, 2, 2)
            for step in sample(p, lambda x, sigma, t: x/(sigma**2+1)**.5, x, noise_from([g])): pass
            ends.append(step.x_next)
        assert torch.equal(*ends)
    sd = load_sd(networks='own')
    words = with_words(sd.tokenizer, ['<x>', '<x>_1'])
    assert pickle.loads(pickle.dumps(words)).encode('a <x>')==words.encode('a <x>')
    sd.undo.append(lambda: None)
    with pytest.raises(ValueError, match='unload'): pickle.dumps(sd)
    assert not copy.copy(sd).undo           # takes nothing off the first one

def test_the_programs_help_names_each_of_its_commands(capsys):
    from sdlearn.pocket import __main__
    with pytest.raises(SystemExit): __main__.run(['--help'])
    said = capsys.readouterr().out
    for name in ('train', 'student', 'evaluate', 'card', 'atlas'): assert name in said and name in __main__.__doc__

def test_what_ideas_and_words_are_given_is_looked_at():
    from sdlearn.idea.classes import noisy_batch, one_hot
    from sdlearn.idea.steps import geometric_sigmas
    from sdlearn.text import at_end, first_end
    for odd in (('a',), (1., 'a'), (None,), (math.nan,)):
        with pytest.raises(ValueError, match='^expected '): geometric_sigmas(3, *odd)
    assert one_hot(torch.zeros(0, dtype=torch.long)).shape==(0, 10)
    x, y, g = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), torch.Generator()
    for odd in ((0., 1.), (-1., 1.), (1., math.inf)):
        with pytest.raises(ValueError, match='^expected .*sigmas'): noisy_batch(x, y, g, sigmas=odd)
    ids = torch.tensor([[49406, 320, 49407, 49407], [49406, 49407, 320, 320]])
    assert first_end(ids).tolist()==[2, 1]
    for lost in (ids[:, :2], ids[:1, :2]):
        with pytest.raises(ValueError, match='^expected texts with the end'): at_end(torch.zeros(len(lost), 2, 3), lost)

def test_a_program_without_a_console_draws(monkeypatch):
    from sdlearn import load_sd, txt2img
    monkeypatch.setattr(sys, 'stderr', None)
    txt2img(load_sd(networks='own'), 'a fox', num_inference_steps=1, height=32, width=32, seed=1)
    from sdlearn.core import progress_bar       # of drawings, trainings, paths and rulers
    assert [*progress_bar(range(3), total=3)]==[0, 1, 2]

def test_names_of_files_in_the_command(tmp_path, monkeypatch, capsys):
    from sdlearn import cli
    monkeypatch.setenv('HOME', str(tmp_path))
    Image.new('RGB', (64, 64)).save(tmp_path/'a.png')
    asked = cli.parse(['x', '--image=~/a.png', '--gif=~/film.gif', '-o', '~/b.png'])
    assert asked.image==str(tmp_path/'a.png') and asked.gif==str(tmp_path/'film.gif')
    for end, word in (('xbm', 'colour'), ('palm', 'colour'), ('blp', 'colour')):
        with pytest.raises(ValueError, match=word): cli.writable(tmp_path/f'a.{end}')
    with pytest.raises(ValueError, match='.gif, .webp'): # one list of ends, not two that exclude each other
        cli._check(cli.parse(['x', '--gif', str(tmp_path/'f.xyz'), '-o', str(tmp_path/'b.png')]))
    cli.save_picture(Image.new('RGB', (8, 8)), tmp_path/'c.png', dict(prompt='x', lora=['gone.safetensors']))
    with pytest.raises(ValueError, match='--lora'): cli.parse(['--again', str(tmp_path/'c.png')])

def test_noise_levels_that_would_be_misread_are_refused():
    from sdlearn.schedule import read_schedule
    base = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
    for more in (dict(use_lu_lambdas=True), dict(lambda_min_clipped=-2.), dict(timestep_type='continuous')):
        with pytest.raises(ValueError, match=[*more][0]): read_schedule(base|more)
    read_schedule(base|dict(use_lu_lambdas=False, lambda_min_clipped=-float('inf'), timestep_type='discrete'))

def test_a_scheduler_with_continuous_timesteps_keeps_them():
    from diffusers import EulerDiscreteScheduler
    from dataclasses import replace
    from sdlearn.sample import make_plan
    from sdlearn.schedule import SD_V1
    theirs = EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear',
                                    timestep_type='continuous', prediction_type='v_prediction')
    plan = make_plan(theirs, 5, replace(SD_V1, prediction_type='v_prediction'))
    theirs.set_timesteps(5)
    assert plan.timesteps==theirs.timesteps.tolist()

def test_a_killed_save_with_our_number_is_no_obstacle(tmp_path):
    from sdlearn import load_sd
    (tmp_path/f'.c.{os.getpid()}'/'unet').mkdir(parents=True)    # in a container numbers come again
    load_sd(networks='own').save(tmp_path/'c')

def test_a_benchmark_of_too_many_steps_is_refused(capsys):
    from sdlearn import bench
    with pytest.raises(SystemExit): bench.main(['--steps', '2000', '-n', '1'])

def _asked():
    "pocket in our own networks, latents and words"
    from sdlearn import load_sd
    from sdlearn.text import embed_prompts
    sd = load_sd(networks='own')
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return sd, x, embed_prompts(sd.tokenizer, sd.text_encoder, ['a cat', 'a fox'])

def test_a_training_is_noticed_whose_optimizer_leaves_no_trace():
    from sdlearn.train import train_steps
    from sdlearn.adapt.lora import Pair, lora_layers, merge_lora
    from sdlearn.fast.speed import packed
    from sdlearn.unet import prepare
    sd, x, words = _asked()
    pairs = {f'unet.{k}': Pair(torch.ones(4, m.in_features)*.01, torch.ones(m.out_features, 4)*.01, 4.)
             for k, m in lora_layers(sd.unet).items()}
    undo = merge_lora(pairs, unet=sd.unet)
    nets = packed(sd).unet, prepare(sd.unet)
    with torch.no_grad():
        for net in nets: net(x, 5, words)
    sd.unet.requires_grad_(True)
    def loss(g): return sd.unet(x, 5, words).square().mean()
    for step in train_steps(loss, sd.unet, 1, 0, lr=1e-3, warmup=0): pass
    with torch.no_grad():
        for net in nets: assert_close(net(x, 5, words), sd.unet(x, 5, words), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match='trained, after it'): undo()   # would undo the training

def test_two_threads_draw_with_one_packed_network():
    from sdlearn.fast.speed import packed
    from sdlearn.text import embed_prompts
    sd, x, _ = _asked()
    unet, plain = packed(sd).unet, sd.unet
    texts = [embed_prompts(sd.tokenizer, sd.text_encoder, [t]*2) for t in ('a fox', 'a red house')]
    wrong, turns = [], [threading.Event(), threading.Event()]
    class Slow(type(unet)): # lets the other thread in before it hands its network out
        def make(self):
            made, me = super().make(), int(threading.current_thread().name)
            turns[me].set()
            turns[1-me].wait(1)
            return made
    unet = Slow(plain)
    @torch.no_grad()
    def draw():
        words = texts[int(threading.current_thread().name)]
        for t in (900, 700, 500): wrong.append((unet(x, t, words)-plain(x, t, words)).abs().max().item())
    both = [threading.Thread(target=draw, name=str(i)) for i in range(2)]
    for thread in both: thread.start()
    for thread in both: thread.join()
    assert len(wrong)==6 and max(wrong)<1e-3

def test_a_packed_weight_is_looked_for_once():
    from sdlearn.fast.speed import _kept
    memo, done = {i: i+1 for i in range(4)}, []
    def order(): # another thread clears what is kept meanwhile
        done.append(memo.clear())
        return 5
    assert _kept(memo, 9, order)==5 and memo=={9: 5}
    memo = {i: i+1 for i in range(5)}       # two threads put theirs in at once
    assert _kept(memo, 9, lambda: 6)==6 and memo=={9: 6}

def test_seamless_pictures_are_seamless_when_packed():
    from sdlearn.fast.speed import packed
    sd, x, words = _asked()
    for m in sd.unet.modules():
        if isinstance(m, torch.nn.Conv2d): m.padding_mode = 'circular'
    with torch.no_grad(): assert_close(packed(sd).unet(x, 5, words), sd.unet(x, 5, words), rtol=1e-3, atol=1e-3)

def test_autocast_and_what_is_remembered():
    from sdlearn.fast.speed import packed
    from sdlearn.unet import prepare
    sd, x, words = _asked()
    for net in (prepare(sd.unet), packed(sd).unet):
        for on in (False, True, False):
            with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16, enabled=on):
                assert_close(net(x, 5, words), sd.unet(x, 5, words), rtol=1e-3, atol=1e-3)

def test_a_layer_with_a_forward_of_its_own_is_asked():
    from sdlearn.unet import prepare
    sd, x, words = _asked()
    layer = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    def louder(x, plain=layer.forward): return 3*plain(x)       # as kohya's LoRAs are put on
    layer.forward = louder
    with torch.no_grad(): assert_close(prepare(sd.unet)(x, 5, words), sd.unet(x, 5, words), rtol=1e-3, atol=1e-3)

def test_words_and_weights_of_inference_mode_may_change():
    from sdlearn.fast.speed import packed
    from sdlearn.unet import prepare
    sd, x, words = _asked()
    with torch.inference_mode():
        words, mine = words.clone(), copy.deepcopy(sd)
        nets = prepare(sd.unet), packed(mine).unet
        for net in nets: net(x, 9, words)
        words.mul_(.3)
        for p in mine.unet.parameters(): p.mul_(.9)
        for net in nets: assert_close(net(x, 5, words), net.unet(x, 5, words), rtol=1e-3, atol=1e-3)

def test_a_lora_on_weights_of_inference_mode():
    from sdlearn.adapt.lora import Pair, lora_layers, merge_lora
    sd, *_ = _asked()
    pairs = {f'unet.{k}': Pair(torch.ones(4, m.in_features), torch.ones(m.out_features, 4), 4.)
             for k, m in lora_layers(sd.unet).items()}
    with torch.inference_mode():
        unet = copy.deepcopy(sd.unet)
        merge_lora(pairs, unet=unet)()
        for p, q in zip(unet.parameters(), sd.unet.parameters()): assert torch.equal(p, q)

def test_a_packed_network_is_trained_as_the_plain_one(tmp_path):
    from sdlearn.adapt.lora import learn_lora, lora_loss
    from sdlearn.fast.speed import packed
    from sdlearn.train import fingerprint
    sd, x, words = _asked()
    unet = packed(sd).unet
    pairs = [learn_lora(net, lora_loss(x, words, 2), 2, progress=False) for net in (sd.unet, unet)]
    for k, pair in pairs[0].items(): assert torch.equal(pair.up, pairs[1][k].up)
    before = fingerprint([unet])
    assert before==fingerprint([sd.unet])
    with torch.no_grad(): sd.unet.conv_in.weight.mul_(2)
    assert fingerprint([unet])!=before      # or a run would go on from another network

def test_a_packed_network_with_low_rank_layers_is_not_saved(tmp_path):
    from sdlearn.adapt.lora import put_lora
    from sdlearn.fast.speed import packed
    sd, *_ = _asked()
    sd = packed(sd)
    put_lora(sd.unet)
    with pytest.raises(ValueError, match='LowRank'): sd.save(tmp_path/'c')

def test_a_part_of_a_packed_network_is_exchanged():
    from sdlearn.fast.speed import packed
    sd, x, words = _asked()
    unet = packed(sd).unet
    with torch.no_grad():
        unet(x, 5, words)
        unet.conv_out = copy.deepcopy(unet.conv_out)
        unet.conv_out.weight.mul_(0)
        assert sd.unet.conv_out is unet.conv_out
        assert_close(unet(x, 5, words), sd.unet(x, 5, words), rtol=1e-3, atol=1e-3)

def test_a_packed_network_is_exported():
    from sdlearn.fast import export
    from sdlearn.fast.speed import packed
    sd, *_ = _asked()
    assert export.parts(packed(sd))['unet'][0].net is sd.unet

def test_a_feature_cache_takes_a_timestep_for_each_picture():
    from sdlearn.fast.cache import FeatureCache
    from sdlearn.pipeline import plan_for
    sd, x, words = _asked()
    plan = plan_for(sd, 'ddim', 4)
    cache, t = FeatureCache(sd.unet, plan, 2), plan.timesteps[0]
    with torch.no_grad():
        assert_close(cache(x, torch.tensor([t, t]), words), sd.unet(x, t, words), rtol=1e-3, atol=1e-3)
        with pytest.raises(ValueError, match='of the plan'): cache(x, torch.tensor([t, 3]), words)

def test_settings_of_numpy_are_saved_and_read_others_refused(tmp_path):
    from diffusers import DDIMScheduler
    from sdlearn import load_sd
    sd, *_ = _asked()
    import numpy as np
    mine = replace(sd, num_inference_steps=np.int64(5), guidance_scale=np.float32(3), sampler='euler')
    again = load_sd(mine.save(tmp_path/'a'), networks='own')
    assert (again.num_inference_steps, again.guidance_scale, again.sampler)==(5, 3., 'euler')
    for odd in (dict(sampler=DDIMScheduler()), dict(num_inference_steps='many')):
        with pytest.raises(ValueError, match='in the settings'): replace(sd, **odd).save(tmp_path/'b')
    file = tmp_path/'a'/'scheduler'/'scheduler_config.json'
    file.write_text(file.read_text().replace('"euler"', '"eular"'))
    with pytest.raises(ValueError, match='in the settings'): load_sd(tmp_path/'a', networks='own')

def test_explorers_see_another_decoder_and_name_odd_sides():
    from sdlearn import explore
    sd, *_ = _asked()
    one = explore.words(sd, 'a fox', steps=1)
    one.painter.settle()
    before = one.picture.value
    with torch.no_grad(): sd.vae.post_quant_conv.weight.mul_(.3)
    one.controls['layer'].value = [v for _, v in one.controls['layer'].options][1]
    one.painter.settle()
    two = explore.words(sd, 'a fox', steps=1)
    two.controls['layer'].value = one.controls['layer'].value
    two.painter.settle()
    assert one.picture.value==two.picture.value!=before
    sd.unet.config.sample_size = 15         # 15, 8, 4: as the network halves
    assert 'middle, 4x4' in dict(explore._layers(sd.unet))

def test_a_bundle_without_the_table_of_its_words_is_not_saved(tmp_path):
    from sdlearn.adapt.inversion import save_word
    sd, *_ = _asked()
    sd.load_word(save_word(tmp_path/'w.safetensors', '<x>', torch.randn(2, 128)))
    other = replace(sd)
    sd.unload()         # takes its rows out of the table of both
    with pytest.raises(ValueError, match='at most 49408 tokens'): other.save(tmp_path/'c')

def test_the_scale_of_a_low_rank_layer_and_a_new_forward_are_noticed():
    from sdlearn.adapt.lora import put_lora
    from sdlearn.fast.speed import packed
    from sdlearn.unet import prepare
    sd, x, words = _asked()
    nets, low = (prepare(sd.unet), packed(sd).unet), put_lora(sd.unet)
    mid = sd.unet.mid_block
    with torch.no_grad():
        for m in low.values(): m.up.weight.fill_(.01)
        for net in nets: net(x, 5, words)
        for m in low.values(): m.scale = 0.
        for net in nets: assert_close(net(x, 5, words), sd.unet(x, 5, words), rtol=1e-3, atol=1e-3)
        mid.forward = lambda *asked, plain=mid.forward: 2*plain(*asked)
        for net in nets: assert_close(net(x, 5, words), sd.unet(x, 5, words), rtol=1e-3, atol=1e-3)
