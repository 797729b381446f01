"""What it takes to serve, keep and train many prefixes on one base, against one at a time, PEFT and the base alone.

Every round runs all variants once, in turn; the figures are medians and quartiles over rounds, ratios within a round.

    .venv/bin/python benchmarks/serving.py                    # SmolLM2-135M, 32 requests, 20 virtual tokens
    .venv/bin/python benchmarks/serving.py --parts requests   # only one of requests, bank, memory and training
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from measuring import Seconds, Variants, measured, mebibytes, quartiles, ratios
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_prefix import PrefixConfig, PrefixModel, PromptTargetCollator

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import smollm2
import table_to_text

PARTS = ("requests", "bank", "memory", "training")
Inputs = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal model; default SmolLM2-135M")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=32, help="requests in a batch, each with a prefix of its own")
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate for each request")
    parser.add_argument("--prefixes", type=int, default=1000, help="prefixes in the large bank")
    parser.add_argument("--trained", type=int, nargs="+", default=[8, 16], help="how many prefixes to train at once")
    parser.add_argument("--rounds", type=int, default=11, help="batches and training steps of each variant")
    parser.add_argument("--rounds-one-by-one", type=int, default=5, help="the same where requests run one by one")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure this process's processor time, for machines that do other work, too; with OMP_NUM_THREADS=1",
    )
    options = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    base, tokenizer, origin = smollm2.load(options.model)
    base.eval()
    console = Console(width=140)
    console.print(
        f"{origin}; {options.virtual_tokens} virtual tokens; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads",
        highlight=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Benchmark(base, tokenizer, options, Path(folder), console)
        for part in options.parts:
            getattr(bench, part)()


@dataclass
class Benchmark:
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: argparse.Namespace
    folder: Path
    console: Console

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.options.cpu_time else time.perf_counter

    def requests(self) -> None:
        """A batch in which each row has its own prefix, against everything else that serves the same requests."""
        options, names = self.options, names_of(self.options.requests)
        batch = self.prompts(options.requests)
        singles = [without_padding(batch, row) for row in range(options.requests)]
        longest, shortest = (pick(one["input_ids"].shape[1] for one in singles) for pick in (max, min))
        self.console.print(f"\nPrompts of {shortest} to {longest} tokens, {options.new_tokens} new ones.")

        model = self.with_prefixes(self.saved("requests", names, init="vocabulary"))
        prefix_tuned, adapted = peft_with_prefixes(self.base, model, names), peft_with_lora(self.base, names)

        def ours_one_by_one() -> list[torch.Tensor]:
            texts = []
            for name, one in zip(names, singles, strict=True):
                model.set_prefix(name)
                texts.append(self.generated(model, one))
            return texts

        def peft_one_by_one() -> list[torch.Tensor]:
            texts = []
            for name, one in zip(names, singles, strict=True):
                prefix_tuned.set_adapter(name, inference_mode=True)
                texts.append(self.generated(prefix_tuned, one))
            return texts

        def mixed() -> torch.Tensor:
            return self.generated(model, batch, prefix_names=names)

        def plain() -> torch.Tensor:
            self.base.requires_grad_(True)  # as it is loaded: torch takes a faster way for the head's weights then
            texts = self.generated(self.base, batch)
            self.base.requires_grad_(False)
            return texts

        expected = peft_one_by_one()
        self.compare("PEFT, one at a time", expected, "one at a time", ours_one_by_one())
        self.compare("PEFT, one at a time", expected, "mixed batch", list(mixed()))
        batches = {
            "base without prefixes": plain,
            "mixed batch": mixed,
            "PEFT's LoRA, mixed batch": lambda: self.generated(adapted, batch, adapter_names=names),
        }
        self.rates("one batch", measured(batches, options.rounds, self.clock), "the base")
        one_by_one = {"PEFT's prefix-tuning": peft_one_by_one, "one at a time": ours_one_by_one, "mixed batch": mixed}
        self.rates("one at a time and in a batch", measured(one_by_one, options.rounds_one_by_one, self.clock), "PEFT")

    def bank(self) -> None:
        """Batches from a large bank against a small one, prefixes that come and go meanwhile."""
        options, random_names = self.options, random.Random(0)
        batch, names = self.prompts(options.requests), names_of(options.prefixes)
        files = self.saved("bank", names, init="normal")
        small = self.with_prefixes(dict(list(files.items())[: options.requests]))
        large = PrefixModel(self.base).eval()
        start = self.clock()
        for name, file in files.items():
            large.load_prefix(file, name)
        loading = self.clock() - start

        def drawn(model: PrefixModel) -> Callable[[], torch.Tensor]:
            return lambda: self.generated(
                model, batch, prefix_names=random_names.sample(list(model.prefixes.entries), options.requests)
            )

        guests = [f"guest{number}" for number in range(10)]
        for guest in guests:
            large.load_prefix(files[names[0]], guest)
        comings = Comings(large, files, guests, per_second=10)

        def with_comings() -> None:
            with comings:
                self.generated(large, batch, prefix_names=random_names.sample(names, options.requests))

        large_name, count = f"bank of {options.prefixes:,}", options.requests
        variants: Variants = {
            f"bank of {count}": drawn(small),
            large_name: drawn(large),
            f"{large_name}, 10 exchanged per second": with_comings,
        }
        self.rates(f"a batch of {count}", measured(variants, options.rounds, self.clock), f"the bank of {count}")

        gathering = []
        for _ in range(51):
            some = random_names.sample(names, count)
            start = self.clock()
            readers = large._readers(some, batch)
            assert readers is not None
            readers.states(large.base, large._injection.structure)(count)
            gathering.append(1000 * (self.clock() - start))
        low, middle, high = quartiles(gathering)
        self.console.print(
            f"\nLookup and gathering for a batch of {count}: {middle:.1f} ms ({low:.1f} to {high:.1f}). "
            f"Loaded per second: {len(names) / loading:.0f}. Exchanged while serving: {comings.count}.",
            highlight=False,
        )

    def memory(self) -> None:
        """How much memory the bank's prefixes take, against the sizes of their files."""
        lines = ["", "| file | files, MiB | bank, MiB | of the files |", "| --- | --: | --: | --: |"]
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            files = self.saved(name, names_of(self.options.prefixes), init="normal", dtype=dtype)
            size = sum((file / "prefix.safetensors").stat().st_size for file in files.values()) / 2**20
            with fresh_process() as pool:
                growth = pool.apply(growth_by_loading, (self.options.model, files))
            lines.append(f"| {name} | {size:,.0f} | {growth:,.0f} | {growth / size:.3f} |")
        self.console.print("\n".join(lines), highlight=False)

    def training(self) -> None:
        """One step of many prefixes in a mixed batch, against a step of each."""
        lines = [
            "",
            "| prefixes | rows of each | lengths | rows/s, one after the other | at once | ratio | quartiles |",
            "| --- | --: | --- | --: | --: | --: | --: |",
        ]
        for count in self.options.trained:
            for rows, alike in ((1, True), (2, True), (2, False)):
                steps = self.training_steps(count, rows, alike)
                seconds = list(measured(steps, self.options.rounds, self.clock).values())
                low, middle, high = ratios(*seconds)
                rates = " | ".join(f"{rows * count / quartiles(values)[1]:.1f}" for values in seconds)
                what = "similar" if alike else "as drawn"
                lines.append(f"| {count} | {rows} | {what} | {rates} | {middle:.2f} | {low:.2f} to {high:.2f} |")
        self.console.print("\n".join(lines), highlight=False)

    def training_steps(self, count: int, rows_each: int, alike: bool) -> Variants:
        """A step of each of some prefixes, one after the other and at once.

        Args:
            count: How many prefixes.
            rows_each: Rows of each in a step.
            alike: Take rows of similar length, as the `Trainer` does with `train_sampling_strategy="group_by_length"`.
        """
        names = names_of(count)
        model = PrefixModel(self.base)
        for seed, name in enumerate(names):
            model.add_prefix(name, PrefixConfig(num_virtual_tokens=self.options.virtual_tokens, init_seed=seed))
        collate = PromptTargetCollator(self.tokenizer, model)
        examples, _ = table_to_text.load(str(table_to_text.SAMPLE), "train")
        total = rows_each * count
        drawn = table_to_text.draw(examples, len(examples) if alike else total, seed=0)
        rows = [table_to_text.row_of(example) for example in drawn]
        if alike:
            rows.sort(key=lambda row: len(row["prompt"] + row["target"]))
            rows = rows[(len(rows) - total) // 2 :][:total]
        each = [(name, collate(rows[k * rows_each : (k + 1) * rows_each])) for k, name in enumerate(names)]
        every, row_names = collate(rows), [name for name in names for _ in range(rows_each)]
        own = {name: torch.optim.AdamW(model.prefixes[name].parameters(), lr=1e-2) for name in names}
        common = torch.optim.AdamW(model.prefixes.parameters(), lr=1e-2)

        def one_after_the_other() -> None:
            model.train()
            for name, batch in each:
                model.set_prefix(name)
                model(**batch).loss.backward()
                own[name].step()
                own[name].zero_grad()

        def at_once() -> None:
            model.train()
            model(**every, prefix_names=row_names).loss.backward()
            common.step()
            common.zero_grad()

        return {"one after the other": one_after_the_other, "at once": at_once}

    def prompts(self, count: int) -> Inputs:
        """Tables to be described, padded on the left."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
        examples, _ = table_to_text.load(str(table_to_text.SAMPLE), "train")
        texts = [table_to_text.prompt_of(example) for example in table_to_text.draw(examples, count, seed=0)]
        return dict(tokenizer(texts, return_tensors="pt", padding=True))

    def generated(self, model: Any, inputs: Inputs, **more: Any) -> torch.Tensor:
        """The new tokens, `(rows, new)`; end tokens end nothing, so that every variant does the same work."""
        new = dict(max_new_tokens=self.options.new_tokens, min_new_tokens=self.options.new_tokens, do_sample=False)
        texts = model.generate(**inputs, **new, pad_token_id=self.tokenizer.eos_token_id, **more)
        return texts[:, inputs["input_ids"].shape[1] :]

    def saved(
        self, folder: str, names: Sequence[str], dtype: torch.dtype = torch.float32, **how: Any
    ) -> dict[str, Path]:
        """Different prefixes on disk, by name."""
        model, files = PrefixModel(self.base), {}
        for seed, name in enumerate(track(names, description="writing", transient=True)):
            model.add_prefix(name, PrefixConfig(num_virtual_tokens=self.options.virtual_tokens, init_seed=seed, **how))
            files[name] = self.folder / folder / name
            model.save_pretrained(files[name], prefix_name=name, dtype=dtype)
            model.set_prefix(None)
            model.remove_prefix(name)
        return files

    def with_prefixes(self, files: dict[str, Path]) -> PrefixModel:
        """The base with these prefixes, frozen."""
        model = PrefixModel(self.base)
        for name, file in files.items():
            model.load_prefix(file, name)
        return model.eval()

    def compare(
        self, one_name: str, one: Sequence[torch.Tensor], other_name: str, other: Sequence[torch.Tensor]
    ) -> None:
        """Say how many texts are the same."""
        same = sum(torch.equal(left.flatten(), right.flatten()) for left, right in zip(one, other, strict=True))
        self.console.print(f"Same texts, {one_name} and {other_name}: {same} of {len(one)}.", highlight=False)

    def rates(self, what: str, seconds: Seconds, reference: str) -> None:
        """A Markdown table: requests per second, and ratios to the first variant."""
        references = next(iter(seconds.values()))
        lines = [
            "",
            f"| {what} | seconds | requests per second | of {reference} | quartiles |",
            "| --- | --: | --: | --: | --: |",
        ]
        for name, values in seconds.items():
            low, middle, high = ratios(references, values)
            time_of = quartiles(values)[1]
            rate = self.options.requests / time_of
            lines.append(f"| {name} | {time_of:.2f} | {rate:.2f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
        self.console.print("\n".join(lines), highlight=False)


class Comings:
    """While this is open, a thread takes prefixes out of a model and loads others in their place.

    Args:
        model: The model.
        files: Where prefixes are.
        names: Names that come and go; no request has them.
        per_second: How many are exchanged.
    """

    def __init__(self, model: PrefixModel, files: dict[str, Path], names: Sequence[str], per_second: float) -> None:
        self.model, self.files, self.names, self.pause = model, list(files.values()), names, 1 / per_second
        self.count = 0

    def __enter__(self) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._exchange)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _exchange(self) -> None:
        while not self.over.wait(self.pause):
            name = self.names[self.count % len(self.names)]
            self.model.remove_prefix(name)
            self.model.load_prefix(self.files[self.count % len(self.files)], name)
            self.count += 1


def names_of(count: int) -> list[str]:
    return [f"prefix{number}" for number in range(count)]


def without_padding(batch: Inputs, row: int) -> Inputs:
    """One row of a batch that is padded on the left."""
    length = int(batch["attention_mask"][row].sum())
    return {name: tensor[row : row + 1, -length:] for name, tensor in batch.items()}


def peft_with_prefixes(base: PreTrainedModel, model: PrefixModel, names: Sequence[str]) -> PeftModel:
    """PEFT's model with the same prefixes, on the same base."""
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=model.prefixes.entry(names[0]).config.num_virtual_tokens
    )
    result = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        result.add_adapter(name, copy.deepcopy(config))
    for name in names:
        result.peft_config[name].inference_mode = True  # the numbers themselves, without looking them up
        layers = model.prefix_state_dict(name).values()  # keys and values in turn, (H, p, D)
        numbers = torch.stack(list(layers)).permute(2, 0, 1, 3).flatten(1)
        result.prompt_encoder[name].load_prompt_embeddings(numbers)
    return result.requires_grad_(False).eval()


def peft_with_lora(base: PreTrainedModel, names: Sequence[str]) -> PeftModel:
    """PEFT's model with a LoRA adapter of each name, on a copy of the base, whose modules it replaces."""
    # On SmolLM2-135M as many numbers as 20 virtual tokens.
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    result = get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        result.add_adapter(name, config)
    return result.requires_grad_(False).eval()


def fresh_process() -> Any:
    """A process of its own, whose allocator gives freed memory back at once."""
    os.environ.update(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    return multiprocessing.get_context("spawn").Pool(1)


def growth_by_loading(model_name: str | None, files: dict[str, Path]) -> float:
    """MiB that loading these prefixes adds to the process."""
    transformers.utils.logging.disable_progress_bar()
    model = PrefixModel(smollm2.load(model_name)[0])
    for file in list(files.values())[:2]:  # whatever is made once
        model.load_prefix(file, "first")
        model.set_prefix(None)
        model.remove_prefix("first")
    gc.collect()
    before = mebibytes("VmRSS")
    for name, file in files.items():
        model.load_prefix(file, name)
    return mebibytes("VmRSS") - before


if __name__ == "__main__":
    main()
