"One training loop: seeded, averaged, resumable after a kill, stopped at the first NaN"
import copy, math, os, time
from pathlib import Path
import torch
from torch import nn

def batch_rng(
    seed:int,  # Seed of the whole run
    step:int,  # Step number
    rank:int=0,# Which of several processes
)->torch.Generator: # On the CPU
    "A fresh generator for every step: a resumed run sees exactly the batches an uninterrupted one sees"
    return torch.Generator().manual_seed((seed*1_000_003+step)*64+rank)

def save_state(
    state:dict,  # Tensors, numbers, lists, dicts
    path,        # File; replaced in one move, so a kill leaves the old file or the new one
):
    "Write a training state atomically"
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, tmp := path.with_name(path.name+'.tmp')); os.replace(tmp, path)

def ema_decay(
    step:int,     # 0-based
    decay:float,  # Final decay, e.g. 0.999
)->float:         # Grows from 0.1 so that early averages forget the random start
    "Decay of the exponential moving average at a step"
    return min(decay, (1+step)/(10+step))

def fit(
    model:nn.Module,      # Trained in place; ends with the averaged weights
    loss_fn,              # (model, generator) -> scalar loss; draws its own batch with the generator
    steps:int,            # Total, counted from zero also after a resume
    lr:float=1e-3,        # Peak learning rate of AdamW
    warmup:int=100,       # Steps of linear warm-up
    decay:bool=False,     # Cosine decay to zero over `steps`
    ema:float=.999,       # Decay of the averaged weights
    path=None,            # State file: resumed from when it exists, saved to as the run goes on
    save_every:float=60,  # Seconds between saves
    seed:int=0,           # Everything random follows from it
    mixed_precision:str='no', # 'no', 'bf16' or 'fp16', as in Accelerate
    preview=None,         # (averaged model, step) -> None, e.g. draws sample pictures
    preview_every:int=0,  # Steps between previews, 0 for none
    weight_decay:float=.01,
    progress:bool=True,   # Show a progress bar
)->list:                  # Loss of every step, those of the resumed run included
    "Train with AdamW on one CPU, one GPU or, under `accelerate launch`, several"
    from accelerate import Accelerator
    from tqdm.auto import tqdm
    acc = Accelerator(mixed_precision=mixed_precision)
    averaged, losses, start = copy.deepcopy(model).requires_grad_(False), [], 0
    averaged.to(acc.device)
    opt = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, betas=(.9, .99), weight_decay=weight_decay)
    if path and Path(path).exists():
        s = torch.load(path, map_location='cpu', weights_only=True)
        model.load_state_dict(s['model']); averaged.load_state_dict(s['averaged']); opt.load_state_dict(s['optimizer'])
        start, losses = s['step'], s['losses']
    net, opt = acc.prepare(model, opt)
    def save(step): # the state before `step`
        if path and acc.is_main_process:
            save_state(dict(model=acc.unwrap_model(net).state_dict(), averaged=averaged.state_dict(), optimizer=opt.state_dict(), step=step, losses=losses), path)
    last, bar = time.time(), tqdm(range(start, steps), initial=start, total=steps, disable=not (progress and acc.is_main_process))
    for step in bar:
        for g in opt.param_groups: g['lr'] = lr*min(1, (step+1)/max(warmup, 1))*(.5*(1+math.cos(math.pi*step/steps)) if decay else 1)
        with acc.autocast(): loss = loss_fn(net, batch_rng(seed, step, acc.process_index))
        if not torch.isfinite(loss):
            save(step)
            raise FloatingPointError(f"expected a finite loss, got {loss.item()} at step {step}. The weights from before this step are kept"
                                     + (f" in {path}." if path else ".")+" Try a smaller learning rate.")
        acc.backward(loss); acc.clip_grad_norm_(net.parameters(), 1.); opt.step(); opt.zero_grad()
        d = ema_decay(step, ema)
        with torch.no_grad():
            for a, p in zip(averaged.parameters(), acc.unwrap_model(net).parameters()): a.lerp_(p, 1-d)
            for a, b in zip(averaged.buffers(), acc.unwrap_model(net).buffers()): a.copy_(b)
        losses.append(loss.item())
        if step%20==0: bar.set_postfix(loss=f'{sum(losses[-100:])/len(losses[-100:]):.4f}')
        if preview and preview_every and (step+1)%preview_every==0: preview(averaged, step+1)
        if time.time()-last>save_every: save(step+1); last = time.time()
    if start<steps: save(steps)
    model.load_state_dict(averaged.state_dict())
    return losses
