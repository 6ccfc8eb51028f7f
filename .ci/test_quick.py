"Checks in seconds, no training: structure, tiny networks, samplers, schedules, the recipe's losses"
import ast, configparser, importlib, json, math, os, re, shutil, subprocess, sys
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

rooms = '''core train attention tokenizer text vae unet schedule guidance denoiser schedulers sample load pipeline
    idea.score idea.noise idea.autoencoder idea.contrast judge pocket.atlas pocket.emoji pocket.backdrops
    pocket.looks pocket.captions pocket.scenes pocket.card
    pocket.recipe pocket.evaluate pocket.__main__ cli bench'''.split()  # from the ground up

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
            if other in ('', 'pocket', 'idea'): continue
            assert rooms.index(other)<rooms.index(name), f'{name} imports {other}, which stands above it'

def test_a_notebook_exports_the_module_of_its_name():
    for path in lessons:
        title = next(s for _, s in cells(path, 'markdown')).split('\n')[0].removeprefix('# ')
        name = path.stem.split('_', 1)[1]
        assert title.lower().replace(' ', '_')==name, f'{path.name} is called {title!r}'
        exported = [m[1] for _, s in cells(path) for m in re.finditer(r'#\| default_exp (\S+)', s)]
        for module in exported: assert module.split('.')[-1]==name, f'{path.name} exports {module}'
        colab = f'/nbs/{path.name})'
        assert any(colab in s for _, s in cells(path, 'markdown')), f"{path.name} has another's Colab badge"

def test_links_lead_somewhere():
    for path in notebooks:
        for _, s in cells(path, 'markdown'):
            for link in re.findall(r'\]\((?!http|#)([^)#]+)', s):
                assert (path.parent/link).exists(), f'{path.name} links to {link}, which does not exist'

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
            assert not {n.split('.')[0] for n in names}&{'nbdev', 'fastcore', 'execnb', 'torchvision', 'sklearn'}-(
                {'sklearn'} if path.stem=='score' else set()), path.name
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
    from sdlearn.vae import VAE
    config = dict(block_out_channels=(8, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4, sample_size=16,
                  down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2)
    theirs = randomized(AutoencoderKL(**config))
    ours = VAE(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 8, 12)
    assert_close(ours.quant_conv(ours.encoder(x)), theirs.quant_conv(theirs.encoder(x)), rtol=1e-4, atol=1e-4)
    assert_close(ours.decoder(ours.post_quant_conv(z)), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)

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
    from sdlearn.pocket.recipe import edges, picture_loss, snr_weight
    flat = torch.zeros(1, 3, 16, 16)
    chess = .1*((torch.arange(16)[:, None]+torch.arange(16))%2*2-1).expand(1, 3, 16, 16)
    assert_close(picture_loss(flat+.1, flat).item(), .1+.04+0+.1)      # the edges are right, the colour is not
    assert_close(picture_loss(chess, flat).item(), .1+.04+.2+0)        # the other way round
    assert edges(chess).shape==(1, 2*3*16*15)
    assert kl(torch.zeros(1), torch.zeros(1))==0 and kl(torch.ones(1), torch.zeros(1))==.5
    assert_close(snr_weight(torch.tensor([.1, .447214, 10.])), torch.tensor([.05, 1., 1.]), rtol=1e-4, atol=1e-4)

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

@pytest.mark.skipif(sys.platform!='linux', reason='the launcher forks')
def test_two_processes_train_one_network(tmp_path):
    (tmp_path/'two.py').write_text(two_processes)
    subprocess.run([sys.executable, 'two.py', str(tmp_path)], cwd=tmp_path, check=True, capture_output=True,
                   timeout=120, env=os.environ|dict(PYTHONPATH=str(root)))

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
    loss = clip_loss(torch.tensor([0., .5, 1., 1.]).view(1, 1, 2, 2), encoder, torch.tensor([[-1., 0., 1., 1.]]))
    assert_close(seen[0].flatten(), torch.tensor([-1., 0., 1., 1.]))
    assert_close(loss, torch.tensor(0.))

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
    said = read_schedule(dict(beta_start=.001, beta_end=.02))
    assert said.steps_offset==0 and said.set_alpha_to_one is None           # as diffusers takes what is not said
    said = read_schedule(dict(beta_start=.001, beta_end=.02, steps_offset=1))
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
