"""LoRAs that PEFT, LyCORIS and diffusers write themselves: what each does to their transformer, and what to ours.

Needs torch, diffusers, peft and lycoris-lora beside klein_mlx, so it runs in an environment of its own, outside CI:
`python tests/tools/third_party_loras.py [WORD ...]`, for methods whose names have one of the words. Each is put on
diffusers' golden transformer by its own program, all of its weights are moved, its own writer saves them, and the two
velocities are compared; it prints a table. The exit code is 1 where one differs by over 1e-4 of the largest value, or
where what we do not apply is not refused by name.
"""

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

for folder in (".", "..", "../parity", "../.."):
    sys.path.append(str(Path(__file__).parent / folder))

PRESET = {"enable_conv": False, "target_module": ["Linear"], "target_name": [".*"], "exclude_name": []}
LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "lora, rank-stabilized": {"algo": "lora", "rs_lora": True},
    "lora, scalar": {"algo": "lora", "use_scalar": True},
    "lora, weight decomposition by columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "lora, weight decomposition by rows": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "lora, bypass": {"algo": "lora", "bypass_mode": True},
    "loha": {"algo": "loha"},
    "loha, rank-stabilized": {"algo": "loha", "rs_lora": True},
    "loha, weight decomposition": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr"},
    "lokr, factor 4": {"algo": "lokr", "factor": 4},
    "lokr, both decomposed": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr, whole matrices": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, weight decomposition": {"algo": "lokr", "dora_wd": True},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft"},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
}
REFUSED = {"diag-oft": "OFT", "glora": "GLoRA", "ia3": "IA3"}


def _move(weights: Any) -> None:
    """Add random numbers, so that nothing is at its start, where most methods do nothing."""
    import torch

    torch.manual_seed(2)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn_like(weight) * weight.abs().mean().clamp(min=0.2))


def lycoris_case(options: dict[str, Any]) -> Callable[[Any, Path], None]:
    def make(reference: Any, path: Path) -> None:
        from lycoris import LycorisNetwork, create_lycoris  # type: ignore[import-not-found]

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        LycorisNetwork.apply_preset(PRESET)
        own = {"linear_dim": 4, "linear_alpha": 6.0, **options}
        network = create_lycoris(reference.transformer, 1.0, **own)
        network.apply_to()
        _move(network.parameters())
        reference.kept = network
        network.save_weights(str(path), None, {})

    return make


def peft_case(kind: str) -> Callable[[Any, Path], None]:
    def make(reference: Any, path: Path) -> None:
        from peft import get_peft_model
        from test_parity_lora import move, peft_config

        reference.transformer = get_peft_model(reference.transformer, peft_config(kind))
        move(reference.transformer)
        reference.transformer.save_pretrained(str(path.parent))

    return make


def diffusers_case(**options: Any) -> Callable[[Any, Path], None]:
    """As diffusers' training scripts add an adapter and save it."""

    def make(reference: Any, path: Path) -> None:
        from diffusers.training_utils import _collate_lora_metadata
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict
        from test_parity_lora import move

        model = reference.transformer
        targets = ["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "linear_in"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
        move(model)
        reference.save_lora_weights(
            str(path.parent),
            transformer_lora_layers=get_peft_model_state_dict(model),
            **_collate_lora_metadata({"transformer": model}),
        )

    return make


def cases() -> dict[str, Callable[[Any, Path], None]]:
    from test_parity_lora import KINDS_OF_PEFT

    found = {f"lycoris: {name}": lycoris_case(options) for name, options in LYCORIS.items()}
    found |= {f"peft: {kind}": peft_case(kind) for kind in KINDS_OF_PEFT}
    found["diffusers: trainer"] = diffusers_case(init_lora_weights="gaussian")
    found["diffusers: trainer, rank-stabilized"] = diffusers_case(use_rslora=True)
    found["diffusers: trainer, DoRA"] = diffusers_case(use_dora=True)
    return found


def compare(make: Callable[[Any, Path], None]) -> tuple[float, float] | str:
    """(difference, how far the adapter moves the velocity), or the line with which it is refused."""
    from folders import GOLDEN
    from lora_runs import difference, pipeline, velocity
    from parity_reference import load
    from test_parity_lora import reference_velocity

    from klein_mlx.errors import KleinError

    reference = load(GOLDEN)
    with tempfile.TemporaryDirectory() as folder:
        make(reference, Path(folder) / "lora.safetensors")
        right, pipe = reference_velocity(reference), pipeline()
        plain = velocity(pipe)
        try:
            pipe.load_lora(Path(folder))
        except KleinError as error:
            return str(error).removeprefix(f"{folder}/")
        return difference(velocity(pipe), right), difference(plain, right)


def main() -> int:
    import warnings

    warnings.simplefilter("ignore")
    failed = 0
    print(f"{'method':50} {'difference':>10} {'moved by':>9}")
    for name, make in cases().items():
        if not any(word in name for word in sys.argv[1:] or [""]):
            continue
        found, word = compare(make), REFUSED.get(name.removeprefix("lycoris: "))
        if isinstance(found, str):
            right = word is not None and f"is {word};" in found
            print(f"{name:50} {'refused' if right else 'REFUSED':>10}  {found}")
        else:
            right = word is None and found[0] < 1e-4 < found[1]
            print(f"{name:50} {found[0]:10.1e} {found[1]:9.2f}{'' if right else '  WRONG'}", flush=True)
        failed += not right
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
