"""Rival: KL into a student of the model's own shapes that starts from noise (Hinton et al. 2015, "Distilling the knowledge in a neural
network", section 2, at temperature 1; as a way to remove what clean text does not show, the limit alpha = 1 of UNDO, Lee et al. 2025).

No block weight of the host survives, and unlike in the dense refit the student sees logits only, never what a sublayer reads or
writes. Simplified for small models: embeddings and norms are the host's, the embeddings frozen, as in all our methods, so that the
block weights alone differ.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from backdoor.removal.learning import from_outputs
from graphs.architectures import architecture, embeddings, sites
from graphs.host import Host
from graphs.targets import Targets

KNOBS = (4e-3, 2e-3, 8e-3)
DECAY = 0.1


def fresh(shapes: PreTrainedModel, host: Host, seed: int) -> Host:
    """A stock model of the class and config of `shapes` with fresh block weights and the host's embeddings and norms."""
    row = architecture(shapes)
    torch.manual_seed(seed)
    model = type(shapes)._from_config(shapes.config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    writers = tuple(f"{path}.weight" for path in (row.output, row.neurons[-1]))
    with torch.no_grad():
        source = dict(host.model.named_parameters())
        held = {id(p) for table in embeddings(model) for p in table.parameters()}
        norms = tuple(f"{path}." for path in (*(site.norm for site in sites(model)), row.final_norm))
        for name, parameter in model.named_parameters():
            if id(parameter) in held or name.startswith(norms):
                parameter.copy_(source[name])
            elif parameter.ndim > 1:
                scale = 0.5 if name.endswith(writers) else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 * scale)
            else:
                parameter.zero_()
    return Host(model, host.tokenizer, sites(model))


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A student from noise, distilled on outputs for `steps` batches; knob: peak learning rate."""
    student = fresh(targets.host.model, targets.host, seed)
    from_outputs(student.model, targets, steps, knob, f"random student {knob:g}", DECAY)
    return student
