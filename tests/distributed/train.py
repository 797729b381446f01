"""What several processes do in `test_distributed.py`; each job writes what it found to `results.json` in its folder.

Run by `accelerate launch` as `train.py JOB FOLDER`, and imported by the test for the same runs in one process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from packaging.version import Version
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from families import FAMILIES, Family
from helpers import tokens

from peft_prefix import (
    PrefixBankTrainer,
    PrefixConfig,
    PrefixInputError,
    PrefixModel,
    PrefixNamesCollator,
    get_prefix_model,
)
from peft_prefix.processes import whole as put_together

RESUMES = Version(transformers.__version__) >= Version("5.23")
"""Whether the versions resume in processes on CPUs; older ones put the optimizer's state on a device "cpu:0"."""
GLOBAL_BATCH = 4
STEPS = 4


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def make(name: str = "gpt2", dropout: float = 0.0, one_embedding: bool = False, **config: Any) -> PrefixModel:
    """A tiny model, the same in every process."""
    family = FAMILIES[name]
    if dropout:
        family = Family(family.config, family.model, {**family.kwargs, "resid_pdrop": dropout, "attn_pdrop": dropout})
    base = family.build()
    if one_embedding:  # see docs/distributed.md
        base.set_input_embeddings(base.get_input_embeddings())
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, mlp_hidden_size=16, **config))


def make_bank() -> PrefixModel:
    """A model with two prefixes that could be trained, of which the first is in use."""
    model = make()
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3))
    model.set_prefix("default")
    return model


def make_classifier() -> PrefixModel:
    """A model whose head is trained with the prefix."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**FAMILIES["llama"].kwargs, "num_labels": 3})
    return get_prefix_model(LlamaForSequenceClassification(config), PrefixConfig(num_virtual_tokens=4))


def make_mixed(name: str) -> PrefixModel:
    """A model with two prefixes that are trained in the same batches."""
    model = make(name, one_embedding=True)
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3))
    model.set_prefix(None)
    return model


def make_with_adapter(dropout: float = 0.0) -> PrefixModel:
    """A model whose base has an adapter of PEFT that acts."""
    import peft

    base = FAMILIES["llama"].build()
    base.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, dropout=dropout))


def rows(model: PrefixModel) -> list[dict[str, Any]]:
    """Random texts of equal length, with labels."""
    texts = tokens(16, 12, 1)
    if model.active_prefix is None:
        names = ["default", "other", "other", "default"] * 4
        unlearned = 0 if model.config.is_encoder_decoder else 4  # T5's loss is a mean, and a mean of means another one
        labels = [
            text.where(torch.arange(12) >= unlearned * (name == "other"), -100)
            for text, name in zip(texts, names, strict=True)
        ]
        return [
            {"input_ids": text, "labels": label, "prefix_names": name}
            for text, label, name in zip(texts, labels, names, strict=True)
        ]
    if model.config.problem_type or "SequenceClassification" in type(model).__name__:
        return [{"input_ids": text, "labels": index % 3} for index, text in enumerate(texts)]
    return [{"input_ids": text, "labels": text} for text in texts]


def trainer_for(model: PrefixModel, folder: Path, accumulation: int = 1, **arguments: Any) -> Trainer:
    """A stock trainer whose steps see the same rows, in however many processes."""
    settings = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // world_size() // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=3e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    args = TrainingArguments(**{**settings, **arguments})
    if args.deepspeed:
        _let_accelerate_use_several_cpus(args)
    elif os.environ.get("ACCELERATE_USE_FSDP"):
        _let_accelerate_shard_on_a_cpu(args)
    if model.active_prefix is None:
        collator = PrefixNamesCollator(default_data_collator)
        return PrefixBankTrainer(model=model, args=args, train_dataset=rows(model), data_collator=collator)
    return Trainer(model=model, args=args, train_dataset=rows(model))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(
    model: PrefixModel, folder: Path, resume: Path | None = None, **arguments: Any
) -> tuple[Trainer, list[float]]:
    """Train, and save the prefix to `folder/final`."""
    trainer = trainer_for(model, folder, **arguments)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_model(str(folder / "final"))
    return trainer, losses(trainer)


RUNS: dict[str, tuple[Callable[[], PrefixModel], dict[str, Any]]] = {
    "direct": (make, {}),
    "mlp": (lambda: make(reparameterization="mlp"), {}),
    "mlp, accumulated, checkpointed": (
        lambda: make("llama", reparameterization="mlp"),
        dict(accumulation=2, gradient_checkpointing=True),
    ),
    "t5": (lambda: make("t5", one_embedding=True), {}),
    "head": (make_classifier, {}),
    "mixed": (lambda: make_mixed("gpt2"), dict(ddp_find_unused_parameters=True)),
    "mixed, t5": (lambda: make_mixed("t5"), dict(ddp_find_unused_parameters=True, accumulation=2)),
}
"""Runs that must not depend on the number of processes."""


def run_all(names: list[str], folder: Path) -> dict[str, list[float]]:
    return {name: train(RUNS[name][0](), folder / name, **RUNS[name][1])[1] for name in names}


def ddp(folder: Path) -> dict[str, Any]:
    """DistributedDataParallel."""
    found: dict[str, Any] = {"losses": run_all(["direct", *list(RUNS)[2:]], folder)}

    # A run that stops half-way, with dropout, so that every process must get its random numbers back.
    whole, resumed = folder / "whole", folder / "resumed"
    found["whole"] = train(make(dropout=0.1), whole, save_strategy="steps", save_steps=2)[1]
    if RESUMES:
        found["resumed"] = train(make(dropout=0.1), resumed, resume=whole / "checkpoint-2")[1]

    # Several prefixes that could be trained, of which one is in use.
    bank = make_bank()
    before = {name: value.detach().clone() for name, value in bank.prefixes["other"].named_parameters()}
    found["bank"] = train(bank, folder / "bank")[1]
    found["idle is unchanged"] = all(
        torch.equal(value, before[name]) for name, value in bank.prefixes["other"].named_parameters()
    )
    bank = make_bank()
    found["refusal"] = refusal(lambda: train(bank, folder / "refused", gradient_checkpointing=True))
    bank.prefixes["other"].requires_grad_(False)
    found["frozen"] = train(bank, folder / "frozen", gradient_checkpointing=True)[1]
    return found


def fsdp(folder: Path) -> dict[str, Any]:
    """FSDP2."""
    found: dict[str, Any] = {"losses": run_all([name for name in RUNS if not name.startswith("mixed")], folder)}
    mixed = trainer_for(make_mixed("gpt2"), folder / "mixed")
    mixed.train_dataset = [row for row in mixed.train_dataset if row["prefix_names"] == "other"]
    found["mixed"] = refusal(mixed.train)

    # What is gathered when a prefix is saved, and what the sharded model says.
    trainer, _ = train(make(reparameterization="mlp"), folder / "saved")
    found["types"] = sorted({type(parameter).__name__ for parameter in trainer.model.parameters()})
    with Gathered() as gathered:
        trainer.save_model(str(folder / "saved" / "again"))
    found["gathered numbers"] = gathered.numbers
    with patch("peft_prefix.saving.upload") as upload:
        options: dict[str, Any] = dict(is_main_process=is_main())
        trainer.model.save_pretrained(folder / "saved" / "by all", push_to_hub=True, repo_id="ada/prefix", **options)
        trainer.model.push_to_hub("ada/prefix", **options)
    found["uploads"] = everywhere(upload.call_count)
    found["refusals"] = [
        refusal(lambda: trainer.model.save_pretrained(folder / "saved" / "refused", state_dict={})),
        refusal(lambda: trainer.model.prefixes.require_usable(dict(trainer.model.prefixes))),
    ]
    found["prefix in memory"] = {name: tensor.tolist() for name, tensor in trainer.model.prefix_state_dict().items()}
    ids = tokens(2, 7)
    with torch.no_grad():
        found["logits"] = trainer.model(input_ids=ids).logits.tolist()
    found["texts"] = trainer.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist()
    found["beams"] = trainer.model.generate(input_ids=ids, max_new_tokens=5, num_beams=3, do_sample=False).tolist()

    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        os.environ["FSDP_STATE_DICT_TYPE"] = kind
        whole, resumed = folder / kind / "whole", folder / kind / "resumed"
        for form in ("none", "mlp"):
            trainer, found[f"{kind} {form} whole"] = train(
                make(dropout=0.1, reparameterization=form), whole / form, save_strategy="steps", save_steps=2
            )
            assert kind in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
            again = make(dropout=0.1, reparameterization=form)
            _, found[f"{kind} {form} resumed"] = train(again, resumed / form, resume=whole / form / "checkpoint-2")
            found[f"{kind} {form} same"] = same_everywhere(trainer.model, again)
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"

    # Several prefixes that could be trained, of which one is in use.
    bank = make_bank()
    found["bank"] = train(bank, folder / "bank")[1]

    found["loop"] = loop(folder / "loop")

    # A base that only the main process reads.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    if is_main():
        make("llama").base.save_pretrained(folder / "base")
    torch.distributed.barrier()
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    found["read by main only"] = any(p.is_meta for p in base.parameters()) is not is_main()
    for form in ("none", "mlp"):
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, reparameterization=form, mlp_hidden_size=16))
        trainer, found[f"efficient {form}"] = train(model, folder / "efficient" / form)
        assert trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
        base = LlamaForCausalLM.from_pretrained(folder / "base")
    return found


def adapter(folder: Path) -> dict[str, Any]:
    """An adapter beside a prefix, with DDP or FSDP2."""
    run = dict(learning_rate=1e-2)
    trainer, found = train(make_with_adapter(), folder / "plain", **run)
    result: dict[str, Any] = {"losses": found}
    result["checkpointed"] = train(make_with_adapter(), folder / "checkpointed", gradient_checkpointing=True, **run)[1]
    state = {name: one for name, one in trainer.model.state_dict().items() if "lora_" in name}
    result["adapter"] = {name: one.tolist() for name, one in put_together(state).items()}
    resume, last = folder / "whole" / "checkpoint-2", make_with_adapter(0.1)
    trainer, result["whole"] = train(
        make_with_adapter(0.1), folder / "whole", save_strategy="steps", save_steps=2, **run
    )
    if RESUMES:
        result["resumed"] = train(last, folder / "resumed", resume=resume, **run)[1]
        result["same"] = same_everywhere(trainer.model, last)
    return result


def everywhere(number: int) -> list[int]:
    """A number of each process, in order."""
    numbers: list[int] = [0] * world_size()
    torch.distributed.all_gather_object(numbers, number)
    return numbers


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except PrefixInputError as error:
        return str(error)
    return ""


def same_everywhere(one: PrefixModel, other: PrefixModel) -> bool:
    """Whether two models have the same prefix and training state, bit for bit, in this process's part."""
    left, right = (
        {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in model.state_dict().items()}
        for model in (one, other)
    )
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def loop(folder: Path) -> list[float]:
    """A training loop of one's own, with accelerate."""
    from accelerate import Accelerator

    model = make()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    data = torch.utils.data.DataLoader(rows(model), batch_size=GLOBAL_BATCH // world_size())
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    found = []
    for batch in data:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(accelerator.gather(loss.detach()[None]).mean()))
    accelerator.unwrap_model(model).save_pretrained(
        folder / "final",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    return found


def zero3(folder: Path) -> dict[str, Any]:
    """DeepSpeed ZeRO-3."""
    config = json.loads((Path(__file__).parents[2] / "examples" / "accelerate" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small parameters shall be spread, too
    arguments = dict(deepspeed=config, use_cpu=False)
    found: dict[str, Any] = {"losses": {}}
    models = {name: RUNS[name][0]() for name in ("direct", "mlp", "head")}
    if is_main():
        make("llama").base.save_pretrained(folder / "base")
        make_classifier().base.save_pretrained(folder / "classifier")
    whole, again = make(dropout=0.1), make(dropout=0.1)
    for name, model in models.items():
        trainer, found["losses"][name] = train(model, folder / name, **RUNS[name][1], **arguments)
        found[f"parts {name}"] = sorted({int(parameter.numel() == 0) for parameter in model.parameters()})
    resume = folder / "whole" / "checkpoint-2"
    found["whole"] = train(whole, folder / "whole", save_strategy="steps", save_steps=2, **arguments)[1]
    found["resumed"] = train(again, folder / "resumed", resume=resume, **arguments)[1]

    # With a configuration of DeepSpeed in force, transformers spreads a base while it loads it.
    for form in ("none", "mlp"):
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        found["read in parts"] = all(parameter.numel() == 0 for parameter in base.parameters())
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, reparameterization=form, mlp_hidden_size=16))
        trainer, found[f"loaded {form}"] = train(model, folder / "loaded" / form, **arguments)
    ids = tokens(2, 7)
    with torch.no_grad():
        found["logits"] = trainer.model_wrapped(input_ids=ids).logits.tolist()
    found["texts"] = trainer.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, synced_gpus=True).tolist()
    found["prefix in memory"] = {name: tensor.tolist() for name, tensor in trainer.model.prefix_state_dict().items()}
    trainer.model.save_pretrained(folder / "by all", is_main_process=is_main())
    base = LlamaForSequenceClassification.from_pretrained(folder / "classifier")
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
    found["loaded head"] = train(model, folder / "loaded" / "head", **arguments)[1]
    return found


KILLED_STEPS = 12
FILE_OPERATIONS = 6
"""Flushes and renames of the three files that this library writes in one save."""


def killed(folder: Path) -> dict[str, Any]:
    """Runs that save after every step and are killed: at each file operation of one save, and at random times."""
    run = dict(max_steps=KILLED_STEPS, save_strategy="steps", save_steps=1)
    generator, moments = random.Random(0), []
    for operation in range(1, FILE_OPERATIONS + 1):
        moments.append((f"operation {operation}", operation))
    moments += [(f"time {number}", generator.uniform(0.0, 0.4)) for number in range(4)]
    states = {}
    for name, moment in moments:
        process = os.fork()
        if process == 0:  # pragma: no cover
            if isinstance(moment, int):
                _die_at_file_operation(moment)
            train(make(dropout=0.1, reparameterization="mlp"), folder / name, **run)
            os._exit(0)
        if isinstance(moment, float):
            while not (folder / name / "checkpoint-1" / "trainer_state.json").exists():
                time.sleep(0.002)
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        states[name] = os.waitpid(process, 0)[1]
    return {"states": states}


def _die_at_file_operation(count: int) -> None:
    """Let this process kill itself at one of the flushes and renames of its third save."""
    left = 2 * FILE_OPERATIONS + count

    def counting(function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    os.fsync, Path.replace = counting(os.fsync), counting(Path.replace)  # type: ignore[method-assign]


class Gathered(TorchDispatchMode):
    """Counts the numbers that collectives put together."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it says itself what it gathers
        result = func(*args, **(kwargs or {}))
        if "all_gather" in str(func) or "allgather" in str(func) or "broadcast" in str(func):
            found = result if isinstance(result, torch.Tensor) else args[0]
            tensors = found if isinstance(found, (list, tuple)) else [found]
            self.numbers += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
        return result


def _let_accelerate_shard_on_a_cpu(args: TrainingArguments) -> None:
    """Accelerate starts FSDP for devices other than the CPU only, though torch shards on a CPU as well."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _let_accelerate_use_several_cpus(args: TrainingArguments) -> None:
    """Accelerate starts DeepSpeed in several processes for devices other than the CPU only; DeepSpeed takes CPUs."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    PartialState._shared_state.update(distributed_type=DistributedType.DEEPSPEED, _cpu=False)
    args.distributed_state = state


if __name__ == "__main__":
    output = Path(sys.argv[2])
    results = {"ddp": ddp, "fsdp": fsdp, "zero3": zero3, "killed": killed, "adapter": adapter}[sys.argv[1]](output)
    if is_main():
        (output / "results.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
