"Contrastive language-image pre-training: an image encoder, the loss, and scores"
import torch
from torch import nn
from torch.nn import functional as F

class ResBlock(nn.Module):
    "Halve the side, then two 3x3 convolutions beside a shortcut"
    def __init__(self,
        ci:int, # Channels in
        co:int, # Channels out
    ):
        super().__init__()
        self.down = nn.Conv2d(ci, co, 2, 2)
        self.body = nn.Sequential(nn.GroupNorm(8, co), nn.SiLU(), nn.Conv2d(co, co, 3, padding=1), nn.GroupNorm(8, co), nn.SiLU(), nn.Conv2d(co, co, 3, padding=1))
    def forward(self, x): return (x := self.down(x))+self.body(x)

class ImageEncoder(nn.Module):
    "A small residual network: picture -> unit vector in the space of CLIP's texts"
    def __init__(self,
        dim:int=128,                    # Length of the vector, the text encoder's projection size
        channels:tuple=(32,64,128,192), # Per halving, from 64x64 down to 4x4
        side:int=64,                    # Pictures are resized to this
    ):
        super().__init__()
        self.config = dict(dim=dim, channels=list(channels), side=side)
        self.side, self.body = side, nn.Sequential(*(ResBlock(i, o) for i, o in zip((3, *channels), channels)))
        self.head = nn.Linear(channels[-1]*(side//2**len(channels))**2, dim, bias=False)
    def forward(self,
        image:torch.Tensor, # (B,3,H,W) in -1..1
    )->torch.Tensor:        # (B,dim), unit length
        if image.shape[-1]!=self.side: image = F.interpolate(image, (self.side, self.side), mode='area')
        return F.normalize(self.head(self.body(image).flatten(1)), dim=-1)

def contrastive_loss(
    image:torch.Tensor,  # (B,D) unit vectors of pictures
    text:torch.Tensor,   # (B,D) unit vectors of their captions, in the same order
    scale=20.,           # Inverse temperature; CLIP learns it
)->torch.Tensor:         # Scalar
    "Cross-entropy both ways over the matrix of dot products (Radford et al. 2021, fig. 3)"
    logits, target = scale*image@text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target)+F.cross_entropy(logits.T, target))/2
