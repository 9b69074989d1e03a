"""Makes golden/routing/gru.json: one step of torch.nn.GRUCell and its gradients, for the recurrent router.

    "$PY" golden/make/router_gru.py

Values are float64, printed in full. `loss` is sum(state_out * coefficients); `gradients` are its derivatives.
"""

import json
from pathlib import Path

import torch

torch.manual_seed(20)
WIDTH, TOKENS = 3, 4
cell = torch.nn.GRUCell(WIDTH, WIDTH, dtype=torch.float64)
x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
h = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
coefficients = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
out = cell(x, h)
(out * coefficients).sum().backward()
leaves = {"input": x, "state": h, **dict(cell.named_parameters())}
flat = lambda t: t.detach().flatten().tolist()
record = {
    "about": f"torch.nn.GRUCell of width {WIDTH} on {TOKENS} rows, torch {torch.__version__.split('+')[0]}; rows of r, z, n",
    "width": WIDTH,
    "coefficients": flat(coefficients),
    "values": {name: flat(t) for name, t in leaves.items()},
    "output": flat(out),
    "gradients": {name: flat(t.grad) for name, t in leaves.items()},
}
path = Path(__file__).parent.parent / "routing" / "gru.json"
path.write_text(json.dumps(record, indent=1) + "\n")
print(path)
