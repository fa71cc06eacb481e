"""The published networks as functions of their state dicts, written from the papers and from the names of the tensors.

Each takes every tensor out of a copy of the state dict and ends with none left, so names and shapes are checked as well.
"""

import math

import torch
from torch.nn import functional as F


def randomise(tensors, seed=0):
    """Weights as after training: fan-in scaled matrices, norms near one, small biases; keeps what is not float."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and "resample_filter" not in name:
            out[name] = noise / math.sqrt(value[0].numel())
        elif "resample_filter" in name:
            out[name] = value.clone()
        elif name.endswith(".W") or "freqs" in name or "phases" in name:
            out[name] = noise
        else:
            out[name] = (1.0 if name.endswith("weight") or "gain" in name else 0.0) + 0.2 * noise
    return out


def sinusoid(t, width):
    """Sines then cosines; the slowest frequency is exactly 1/10000 (Ho et al. 2020)."""
    half = width // 2
    freqs = torch.tensor([10000.0 ** (-k / (half - 1)) for k in range(half)], dtype=torch.float64)
    return torch.cat([torch.sin(t[:, None] * freqs), torch.cos(t[:, None] * freqs)], 1)


def upfirdn(x, taps, up, down, pad):
    """Zeros after every pixel, zeros around, the filter, every ``down``-th pixel (StyleGAN2), one channel at a time."""
    n, c, h, w = x.shape
    big = x.new_zeros(n, c, h * up, w * up)
    big[:, :, ::up, ::up] = x
    big = F.pad(big, (*pad, *pad))
    line = torch.tensor(taps, dtype=x.dtype)
    kernel = torch.outer(line, line) / line.sum() ** 2 * up**2
    filtered = F.conv2d(big.reshape(n * c, 1, *big.shape[2:]), kernel.flip(0, 1)[None, None])
    return filtered.reshape(n, c, *filtered.shape[2:])[:, :, ::down, ::down]


class NcsnppReference:
    """score_sde's ncsnpp and ddpm; ``config``: its model and data sections as one mapping."""

    def __init__(self, state, config):
        self.state, self.c = {n: v.double() for n, v in state.items()}, config
        self.fir = config.get("fir", False)
        self.act = F.silu if config["nonlinearity"] == "swish" else F.elu

    def take(self, name):
        return self.left.pop(f"all_modules.{self.i}.{name}")

    def has(self, name):
        return f"all_modules.{self.i}.{name}" in self.left

    def norm(self, x, name):
        c = x.shape[1]
        groups = 32 if self.c["name"] == "ddpm" else min(c // 4, 32)
        return F.group_norm(x, groups, self.take(f"{name}weight"), self.take(f"{name}bias"), 1e-6)

    def conv(self, x, name, stride=1, padding=1):
        return F.conv2d(x, self.take(f"{name}weight"), self.take(f"{name}bias"), stride, padding)

    def nin(self, x, name):
        return torch.einsum("nchw,cd->ndhw", x, self.take(f"{name}.W")) + self.take(f"{name}.b")[:, None, None]

    def down(self, x):
        if self.fir:
            return upfirdn(x, self.c["fir_kernel"], 1, 2, (1, 1))
        return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4

    def up(self, x):
        if self.fir:
            return upfirdn(x, self.c["fir_kernel"], 2, 1, (2, 1))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(self, x, temb, resample=lambda x: x, out=None):
        big = self.c.get("resblock_type") == "biggan" and self.c["name"] != "ddpm"
        h = resample(self.act(self.norm(x, "GroupNorm_0.")))
        x = resample(x)
        h = self.conv(h, "Conv_0.")
        if temb is not None:
            h = h + F.linear(self.act(temb), self.take("Dense_0.weight"), self.take("Dense_0.bias"))[:, :, None, None]
        h = self.conv(self.act(self.norm(h, "GroupNorm_1.")), "Conv_1.")
        if self.has("Conv_2.weight"):
            assert big
            x = self.conv(x, "Conv_2.", padding=0)
        elif self.has("NIN_0.W"):
            assert not big
            x = self.nin(x, "NIN_0")
        self.i += 1
        return self.rescaled(x + h)

    def rescaled(self, x):
        return x / math.sqrt(2) if self.c.get("skip_rescale") and self.c["name"] != "ddpm" else x

    def attention(self, x):
        n, c, h, w = x.shape
        y = self.norm(x, "GroupNorm_0.")
        q, k, v = (self.nin(y, f"NIN_{j}").reshape(n, c, h * w) for j in range(3))
        weights = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(c), dim=2)
        y = self.nin(torch.einsum("nqk,nck->ncq", weights, v).reshape(n, c, h, w), "NIN_3")
        self.i += 1
        return self.rescaled(x + y)

    def __call__(self, x, cond):
        c, self.left, self.i = self.c, dict(self.state), 0
        x, cond = x.double(), cond.double()
        levels = len(c["ch_mult"])
        big = c.get("resblock_type") == "biggan" and c["name"] != "ddpm"
        if c.get("embedding_type") == "fourier":
            angle = 2 * math.pi * torch.log(cond)[:, None] * self.take("W")
            temb, self.i = torch.cat([torch.sin(angle), torch.cos(angle)], 1), 1
        else:
            temb = sinusoid(cond, c["nf"])
        if c["conditional"]:
            temb = F.linear(temb, self.take("weight"), self.take("bias"))
            self.i += 1
            temb = F.linear(self.act(temb), self.take("weight"), self.take("bias"))
            self.i += 1
        else:
            temb = None
        h = x if c["centered"] else 2 * x - 1
        pyramid = h
        hs = [self.plain(h)]
        for level in range(levels):
            for _ in range(c["num_res_blocks"]):
                h = self.block(hs[-1], temb)
                hs.append(self.attention(h) if h.shape[-1] in c["attn_resolutions"] else h)
            if level < levels - 1:
                h = self.block(hs[-1], temb, self.down) if big else self.resized(hs[-1], "down")
                if c.get("progressive_input") == "input_skip":
                    pyramid, self.i = self.down(pyramid), self.i + 1
                    part = self.conv(pyramid, "Conv_0.", padding=0)
                    self.i += 1
                    h = part + h if c["progressive_combine"] == "sum" else torch.cat([part, h], 1)
                elif c.get("progressive_input") == "residual":
                    h = pyramid = self.rescaled(self.resized(pyramid, "down") + h)
                hs.append(h)
        h = self.block(hs[-1], temb)
        h = self.block(self.attention(h), temb)
        answer = None
        for level in reversed(range(levels)):
            for _ in range(c["num_res_blocks"] + 1):
                h = self.block(torch.cat([h, hs.pop()], 1), temb)
            if h.shape[-1] in c["attn_resolutions"]:
                h = self.attention(h)
            if c.get("progressive") == "output_skip":
                if answer is not None:
                    answer, self.i = self.up(answer), self.i + 1
                part = self.finish(h)
                answer = part if answer is None else answer + part
            if level:
                h = self.block(h, temb, self.up) if big else self.resized(h, "up")
        answer = self.finish(h) if answer is None else answer
        assert not self.left, f"never used: {list(self.left)[:3]}"
        return answer

    def finish(self, h):
        h = self.act(self.norm(h, ""))
        self.i += 1
        return self.plain(h)

    def plain(self, x):
        x = self.conv(x, "")
        self.i += 1
        return x

    def resized(self, x, how):
        if self.has("Conv2d_0.weight"):
            assert how == "down" and self.fir
            h = upfirdn(x, self.c["fir_kernel"], 1, 1, (2, 2))
            x = F.conv2d(h, self.take("Conv2d_0.weight"), self.take("Conv2d_0.bias"), stride=2)
        elif self.has("Conv_0.weight"):
            x = (
                self.conv(F.pad(x, (0, 1, 0, 1)), "Conv_0.", 2, 0)
                if how == "down"
                else self.conv(self.up(x), "Conv_0.")
            )
        else:
            x = self.down(x) if how == "down" else self.up(x)
        self.i += 1
        return x


def edm2_reference(state, x, sigma, classes=None, sigma_data=0.5, head=64):
    """EDM2's preconditioned denoiser (Karras et al. 2024, appendix A and figure 21), levels read from the names."""
    left = {n: v.double() for n, v in state.items()}

    def mp(x, name, gain=1.0):  # eq. 47 with eq. 66
        w = left.pop(f"unet.{name}.weight")
        flat = w.reshape(len(w), -1)
        size = flat.shape[1]
        flat = flat / (1e-4 + flat.norm(dim=1, keepdim=True) / math.sqrt(size)) * gain / math.sqrt(size)
        return x @ flat.T if w.ndim == 2 else F.conv2d(x, flat.reshape(w.shape), padding=w.shape[-1] // 2)

    def act(x):
        return x * torch.sigmoid(x) / 0.596

    def plus(a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    def pixel(x, dim=1):
        return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())

    def block(x, emb, name):
        if name.endswith("_down"):
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        if name.endswith("_up"):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        skip = f"unet.{name}.conv_skip.weight" in left
        if name.startswith("enc"):
            x = pixel(mp(x, f"{name}.conv_skip") if skip else x)
        y = mp(act(x), f"{name}.conv_res0")
        scale = mp(emb, f"{name}.emb_linear", left.pop(f"unet.{name}.emb_gain")) + 1
        y = mp(act(y * scale[:, :, None, None]), f"{name}.conv_res1")
        if name.startswith("dec") and skip:
            x = mp(x, f"{name}.conv_skip")
        x = plus(x, y, 0.3)
        if f"unet.{name}.attn_qkv.weight" in left:
            n, c, h, w = x.shape
            y = pixel(mp(x, f"{name}.attn_qkv").reshape(n, c // head, head, 3, h * w), 2)
            q, k, v = y[:, :, :, 0], y[:, :, :, 1], y[:, :, :, 2]
            weights = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(head), 3)
            y = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, h, w)
            x = plus(x, mp(y, f"{name}.attn_proj"), 0.3)
        return x.clamp(-256, 256)

    x, sigma = x.double(), sigma.double().reshape(-1, 1, 1, 1)
    total = sigma**2 + sigma_data**2
    c_noise = sigma.flatten().log() / 4
    features = math.sqrt(2) * torch.cos(
        c_noise[:, None] * left.pop("unet.emb_fourier.freqs") + left.pop("unet.emb_fourier.phases")
    )
    emb = mp(features, "emb_noise")
    if classes is not None:
        emb = plus(emb, mp(classes.double() * math.sqrt(classes.shape[1]), "emb_label"), 0.5)
    emb = act(emb)
    h = torch.cat([x / total.sqrt(), torch.ones_like(x[:, :1])], 1)
    skips = []
    for name in ("8x8_conv", "8x8_block0", "4x4_down", "4x4_block0"):
        h = mp(h, f"enc.{name}") if "conv" in name else block(h, emb, f"enc.{name}")
        skips.append(h)
    for name in ("4x4_in0", "4x4_in1", "4x4_block0", "4x4_block1", "8x8_up", "8x8_block0", "8x8_block1"):
        if "block" in name:
            other = skips.pop()
            a, b = h.shape[1], other.shape[1]
            scale = math.sqrt((a + b) / 0.5) / 2
            h = torch.cat([h * scale / math.sqrt(a), other * scale / math.sqrt(b)], 1)
        h = block(h, emb, f"dec.{name}")
    out = mp(h, "out_conv", left.pop("unet.out_gain"))
    assert set(left) == {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"}
    return sigma_data**2 / total * x + sigma * sigma_data / total.sqrt() * out
