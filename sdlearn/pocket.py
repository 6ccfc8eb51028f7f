"The embedded checkpoint: trained from zero, measured, and saved as diffusers expects it"
import json, time
from functools import lru_cache
from pathlib import Path
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
from sdlearn.core import images_to_tensor
from sdlearn.scenes import subjects, styles, backgrounds, render, held_out, is_held_out
from sdlearn.train import fit
from sdlearn.clip import ImageEncoder, contrastive_loss
from sdlearn.text import TextEncoder, encode_tokens
from sdlearn.tokenizer import Tokenizer

scaling = .18215
vae_config = dict(block_out_channels=(32,64,96,128), down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4,
                  layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=128, scaling_factor=scaling)
text_config = dict(vocab_size=49408, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=77,
                   hidden_act='quick_gelu', projection_dim=128, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
unet_config = dict(sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64,128,176), norm_num_groups=16, layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
                   down_block_types=('DownBlock2D','CrossAttnDownBlock2D','DownBlock2D'), up_block_types=('UpBlock2D','CrossAttnUpBlock2D','UpBlock2D'))

def scene(
    i:int,        # Number of the scene: the same number, the same scene
    n:int=None,   # Among the first `n` subjects
    plain:float=.35, # Share of plain pictures on white; the rest is split between styles, backgrounds and both
)->tuple:         # (subject, style, background), never a held-out pair
    "Draw a scene to train on"
    rng, names = np.random.default_rng(i), subjects(n)
    while True:
        s, kind = names[i%len(names)], rng.random()
        style = 'plain' if kind<plain or kind>1-(1-plain)/3 else rng.choice([*styles][1:])
        back = 'white' if kind<plain+(1-plain)/3 else rng.choice([*backgrounds][1:])
        if not is_held_out(s, style, back): return s, str(style), str(back)

def pictures(
    path,         # .npy file, made when it is not there, with its captions beside it in .json
    count:int,    # How many
    n:int=None,   # Of the first `n` subjects
    side:int=128, # Pixels
)->tuple:         # (uint8 array (count,side,side,3) mapped from disk, list of captions)
    "The training set: scenes rendered once"
    from tqdm.auto import tqdm
    path = Path(path)
    if not path.with_suffix('.json').exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        out, captions = np.lib.format.open_memmap(path, 'w+', np.uint8, (count, side, side, 3)), []
        for i in tqdm(range(count), desc='rendering'):
            im, text = render(*scene(i, n), seed=i, side=side)
            out[i] = np.asarray(im); captions.append(text)
        out.flush(); path.with_suffix('.json').write_text(json.dumps(captions))
    return np.load(path, mmap_mode='r'), json.loads(path.with_suffix('.json').read_text())

def batch_of(
    data:np.ndarray, # uint8 (N,H,W,3)
    idx,             # Indices
    crop=None,       # Side of a random crop
    rng=None,        # torch Generator for the crop
    device='cpu',
)->torch.Tensor:     # (B,3,H,W) in -1..1
    "Pictures as a float batch"
    x = torch.from_numpy(np.ascontiguousarray(data[np.sort(np.asarray(idx))])).permute(0, 3, 1, 2).to(device).float()/127.5-1
    if crop is None: return x
    top, left = torch.randint(0, x.shape[-1]-crop+1, (2,), generator=rng).tolist()
    return x[..., top:top+crop, left:left+crop].contiguous()

# --- the autoencoder -------------------------------------------------------------------------------------------------
def edges(x): return torch.cat([(x[..., 1:, :]-x[..., :-1, :]).flatten(1), (x[..., 1:]-x[..., :-1]).flatten(1)], 1)

def vae_loss(
    vae,             # diffusers' AutoencoderKL
    x:torch.Tensor,  # (B,3,H,W) in -1..1
    g,               # torch Generator
    kl:float=1e-4,   # Weight of the KL term, per latent number
)->torch.Tensor:
    "L1 + squared error + edges + a little KL towards a standard normal"
    mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    z = mean+(logvar/2).exp()*torch.randn(mean.shape, generator=g).to(mean)
    y = vae.decoder(vae.post_quant_conv(z)).float()
    return F.l1_loss(y, x)+4*F.mse_loss(y, x)+F.l1_loss(edges(y), edges(x))+kl*(mean**2+logvar.exp()-1-logvar).mean()/2

class VAELoss(nn.Module):
    "The whole step inside one forward, so that Accelerate can wrap it"
    def __init__(self, vae): super().__init__(); self.vae = vae
    def forward(self, x, g): return vae_loss(self.vae, x, g)

def train_vae(
    data,            # uint8 pictures (N,128,128,3)
    steps:int,       # Optimiser steps
    run='runs/pocket', # Where the state is kept
    lr:float=8e-4,
    **kw,            # To `fit`
):                   # AutoencoderKL, not yet scaled
    "Autoencoder on crops of 64 px, every third batch on whole pictures"
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    net = VAELoss(AutoencoderKL(**vae_config))
    def loss(net, g):
        whole = torch.rand((), generator=g)<.33
        idx = torch.randint(len(data), (8 if whole else 32,), generator=g)
        return net(batch_of(data, idx, None if whole else 64, g, next(net.parameters()).device), g)
    losses = fit(net, loss, steps, lr=lr, path=Path(run)/'vae.pt', **kw)
    return net.vae.eval(), losses

@torch.no_grad()
def standardize(
    vae,     # AutoencoderKL; its quant convolutions are changed in place
    x:torch.Tensor, # (B,3,H,W) pictures to measure on
):
    "Fold the measured mean and scale of each latent channel into the quant convolutions, so that latents*0.18215 have mean 0 and std 1"
    mean = vae.encode(x).latent_dist.mean
    mu, k = mean.mean((0, 2, 3)), 1/scaling/mean.std((0, 2, 3))
    q, p = vae.quant_conv, vae.post_quant_conv
    p.bias += p.weight[:, :, 0, 0]@mu; p.weight /= k[None, :, None, None]
    q.weight[:4] *= k[:, None, None, None]; q.bias[:4] = (q.bias[:4]-mu)*k; q.bias[4:] += 2*k.log()
    return vae

# --- contrastive pair --------------------------------------------------------------------------------------------------
class Pair(nn.Module):
    "Text encoder and image encoder with a learned temperature"
    def __init__(self):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection
        self.text = CLIPTextModelWithProjection(CLIPTextConfig(**text_config))
        self.image, self.scale = ImageEncoder(text_config['projection_dim']), nn.Parameter(torch.tensor(20.).log())
    def forward(self, x, ids):
        t = F.normalize(self.text(ids).text_embeds.float(), dim=-1)
        return contrastive_loss(self.image(x).float(), t, self.scale.clamp(max=4.6).exp())

def token_ids(tokenizer, texts, pad=True):
    "(B,77) ids; without `pad` only as wide as the longest text, which a causal encoder cannot tell apart"
    return tokenizer(texts, padding='max_length' if pad else True, truncation=True, max_length=77, return_tensors='pt').input_ids

def train_clip(
    data, captions:list, tokenizer, # Pictures (N,S,S,3), their captions
    steps:int,        # Optimiser steps
    run='runs/pocket',
    bs:int=160,
    lr:float=1e-3, **kw):
    "Train both encoders on pictures and captions"
    torch.manual_seed(0)
    pair = Pair()
    with torch.no_grad():
        emb, used = pair.text.get_input_embeddings().weight, token_ids(tokenizer, captions, False).unique()
        keep = torch.zeros(len(emb), 1); keep[used] = 1
        emb.mul_(keep*10) # std .02 -> .2; words never seen stay at zero
    ids = token_ids(tokenizer, captions, False)
    def loss(net, g):
        idx = torch.randint(len(data), (bs,), generator=g).sort().values
        dev = next(net.parameters()).device
        return net(batch_of(data, idx, device=dev), ids[idx].to(dev))
    losses = fit(pair, loss, steps, lr=lr, path=Path(run)/'clip.pt', **kw)
    with torch.no_grad(): emb.mul_(keep)
    return pair.eval(), losses

# --- the denoiser ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def cache_latents(
    vae, data,     # Standardised AutoencoderKL, pictures (N,S,S,3)
    path=None,     # .pt file, read when it exists
    bs:int=32,
)->torch.Tensor:   # (N,4,S/8,S/8) float16, scaled to std 1
    "Encode every picture once: the UNet never sees pixels"
    from tqdm.auto import tqdm
    if path and Path(path).exists(): return torch.load(path, weights_only=True)
    out = torch.cat([vae.encode(batch_of(data, range(i, min(i+bs, len(data))))).latent_dist.mean*scaling for i in tqdm(range(0, len(data), bs), desc='encoding')]).half()
    if path: torch.save(out, path)
    return out

@torch.no_grad()
def cache_texts(
    text_encoder, tokenizer, captions:list, # The frozen text encoder, its tokenizer, one caption per picture
    bs:int=128,
)->tuple:          # ((U,77,D) float16 with "" first, (N,) row of each caption)
    "Encode every distinct caption once"
    from tqdm.auto import tqdm
    rows = {t: i for i, t in enumerate(dict.fromkeys(['', *captions]))}
    texts = list(rows)
    emb = torch.cat([text_encoder(token_ids(tokenizer, texts[i:i+bs]))[0].half() for i in tqdm(range(0, len(texts), bs), desc='texts')])
    return emb, torch.tensor([rows[c] for c in captions])

def snr_weight(
    sigma:torch.Tensor, # Noise std, (B,)
    gamma:float=5.,     # Cap on the signal-to-noise ratio
)->torch.Tensor:        # (B,)
    "Min-SNR weights for noise prediction (Hang et al. 2023, eq. 5)"
    snr = sigma**-2
    return snr.clamp(max=gamma)/snr

def train_unet(
    latents, emb, rows,  # From `cache_latents` and `cache_texts`
    steps:int,           # Optimiser steps in total
    run='runs/pocket',
    bs:int=48,
    lr:float=5e-4,
    drop:float=.1,       # Share of captions replaced by "", so that guidance has an unconditional half
    unet=None,           # Continue from this one
    **kw):
    "Predict the noise in noisy latents, given the caption"
    from diffusers import UNet2DConditionModel
    from sdlearn.schedule import alphas_cumprod
    torch.manual_seed(0)
    unet, abar = unet or UNet2DConditionModel(**unet_config), alphas_cumprod().float()
    def loss(net, g):
        dev = next(net.parameters()).device
        idx, t = torch.randint(len(latents), (bs,), generator=g), torch.randint(len(abar), (bs,), generator=g) # 0..999: t=999 is where sampling starts
        x0, noise, a = latents[idx].float(), torch.randn(bs, *latents.shape[1:], generator=g), abar[t, None, None, None]
        row = torch.where(torch.rand(bs, generator=g)<drop, 0, rows[idx])
        pred = net((a.sqrt()*x0+(1-a).sqrt()*noise).to(dev), t.to(dev), emb[row].float().to(dev)).sample.float()
        w = snr_weight(((1-a)/a).sqrt().flatten()).to(dev)
        return (w*(pred-noise.to(dev)).pow(2).mean((1, 2, 3))).mean()
    losses = fit(unet, loss, steps, lr=lr, path=Path(run)/'unet.pt', **kw)
    return unet.eval(), losses

# --- the checkpoint folder ------------------------------------------------------------------------------------------------
scheduler_config = dict(_class_name='PNDMScheduler', _diffusers_version='0.30.0', beta_end=.012, beta_schedule='scaled_linear', beta_start=.00085,
                        clip_sample=False, num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None) # as in CompVis/stable-diffusion-v1-4
model_index = dict(_class_name='StableDiffusionPipeline', _diffusers_version='0.30.0', feature_extractor=[None, None], requires_safety_checker=False, safety_checker=[None, None],
                   scheduler=['diffusers', 'PNDMScheduler'], text_encoder=['transformers', 'CLIPTextModel'], tokenizer=['transformers', 'CLIPTokenizer'],
                   unet=['diffusers', 'UNet2DConditionModel'], vae=['diffusers', 'AutoencoderKL'])

def _write(folder, config, weights=None, name='diffusion_pytorch_model.safetensors', config_name='config.json'):
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    (folder/config_name).write_text(json.dumps(config, indent=2)+'\n')
    if weights:
        save_file({k: v.half().contiguous() for k, v in weights.items()}, folder/name, metadata={'format': 'pt'})
        (folder/name).chmod(0o644)

def save_checkpoint(
    folder,          # Gets a diffusers folder; an existing tokenizer is kept
    vae=None, pair=None, unet=None, # AutoencoderKL, Pair, UNet2DConditionModel: those that are given are written
):
    "Write half-precision safetensors in the layout that diffusers and transformers of all versions read"
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    (folder/'model_index.json').write_text(json.dumps(model_index, indent=2)+'\n')
    _write(folder/'scheduler', scheduler_config, config_name='scheduler_config.json')
    if vae is not None: _write(folder/'vae', dict(_class_name='AutoencoderKL', _diffusers_version='0.30.0', in_channels=3, out_channels=3, act_fn='silu', force_upcast=True, **vae_config), vae.state_dict())
    if unet is not None: _write(folder/'unet', dict(_class_name='UNet2DConditionModel', _diffusers_version='0.30.0', act_fn='silu', flip_sin_to_cos=True, freq_shift=0,
                                                    center_input_sample=False, downsample_padding=1, mid_block_scale_factor=1, norm_eps=1e-5, **unet_config), unet.state_dict())
    if pair is not None:
        text = {k: v for k, v in pair.text.state_dict().items() if 'position_ids' not in k}
        proj = text.pop('text_projection.weight')
        text = {k if k.startswith('text_model.') else 'text_model.'+k: v for k, v in text.items()} # the nested names: transformers 4 and 5 both read them
        _write(folder/'text_encoder', dict(architectures=['CLIPTextModel'], model_type='clip_text_model', torch_dtype='float32', dtype='float32', layer_norm_eps=1e-5, dropout=0., attention_dropout=0., initializer_factor=1., initializer_range=.02, **text_config), text, 'model.safetensors')
        _write(folder/'clip', pair.image.config, {'text_projection.weight': proj, 'scale': pair.scale, **{'image.'+k: v for k, v in pair.image.state_dict().items()}}, 'model.safetensors')

# --- measuring ------------------------------------------------------------------------------------------------------------
class Clip(nn.Module):
    "Pocket's contrastive pair, for scoring pictures against words"
    def __init__(self, image, text_encoder, tokenizer, projection):
        super().__init__()
        self.image, self.text_encoder, self.tokenizer, self.projection = image, text_encoder, tokenizer, nn.Parameter(projection, False)
    def image_features(self,
        x:torch.Tensor, # (B,3,H,W) in -1..1
    )->torch.Tensor:    # (B,128) unit vectors; differentiable
        "Where pictures lie"
        return self.image(x)
    def text_features(self,
        texts:list,     # Strings
    )->torch.Tensor:    # (B,128) unit vectors
        "Where words lie: the text encoder's output at the end token, projected"
        ids = token_ids(self.tokenizer, texts)
        last = encode_tokens(self.text_encoder, ids)[torch.arange(len(ids)), (ids==49407).int().argmax(1)]
        return F.normalize(last@self.projection.T, dim=-1)

@lru_cache
def load_clip(
    path=None, # A checkpoint folder that has `clip/`; pocket when missing
)->Clip:       # In evaluation mode, gradients off
    "Pocket's own CLIP"
    from safetensors.torch import load_file
    from sdlearn.load import load_own, pocket_path
    folder = Path(path or pocket_path())
    w = {k: v.float() for k, v in load_file(folder/'clip'/'model.safetensors').items()}
    image = ImageEncoder(**json.loads((folder/'clip'/'config.json').read_text()))
    image.load_state_dict({k.removeprefix('image.'): v for k, v in w.items() if k.startswith('image.')})
    clip = Clip(image, load_own(TextEncoder, folder/'text_encoder'), Tokenizer.from_folder(folder/'tokenizer'), w['text_projection.weight'])
    return clip.eval().requires_grad_(False)

@torch.no_grad()
def scores(
    images,        # PIL pictures
    texts:list,    # Strings
    path=None,     # A checkpoint folder; pocket when missing
)->torch.Tensor:   # (n_images, n_texts) cosine similarities
    "What does pocket's CLIP see?"
    clip = load_clip(path)
    return clip.image_features(images_to_tensor(images))@clip.text_features(texts).T
