import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedproxy.errors import ArtifactError, ResourceError
from fedproxy.models import block_stream
from fedproxy.models.block_stream import BlockStream, Passage, carry
from fedproxy.models.checkpoints import load_model
from fedproxy.models.loading import release
from fedproxy.models.source import open_source
from tests.conftest import BLOCKS, FAMILIES, MULTIMODAL, make_model
from tests.in_memory import skipping

Checkpoint = Callable[..., Path]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    mask[2, 4:] = 0
    return ids, mask


def through(stream: BlockStream, passage: Passage, skipped: tuple[int, ...] = ()) -> torch.Tensor:
    """Logits after all blocks but those skipped, [rows, tokens, vocabulary]."""
    for number, _ in stream.walk(number for number in range(len(stream)) if number not in skipped):
        passage.hidden = stream.run(number, passage)
    return torch.stack(list(stream.logits(passage)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_block_by_block_from_shards_is_the_ordinary_forward_pass_to_the_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make_model(family, dtype=dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    ids, mask = padded()
    model = load_model(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    source = open_source(tmp_path)
    stream = BlockStream(source.decoder, source)
    found = through(stream, stream.enter(ids, mask))
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    assert all(weight.is_meta for block in stream.blocks for weight in block.parameters())
    assert torch.equal(through(stream, stream.enter(ids, mask)), found)
    if family not in MULTIMODAL:
        loaded = BlockStream(model)
        assert torch.equal(through(loaded, loaded.enter(ids, mask)), found)
        with torch.no_grad(), skipping(model, [1, 4]):
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = through(stream, stream.enter(ids, mask), skipped=(1, 4))
        assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_a_resident_stream_reads_each_block_once(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tiny_checkpoint())
    reads: list[int] = []
    original = BlockStream._read
    monkeypatch.setattr(BlockStream, "_read", lambda self, number: reads.append(number) or original(self, number))
    stream = BlockStream(source.decoder, source, resident=True)
    ids, mask = padded()
    first = through(stream, stream.enter(ids, mask))
    assert torch.equal(through(stream, stream.enter(ids, mask)), first)
    assert sorted(reads) == list(range(BLOCKS))


def test_losses_are_those_of_the_model(tiny_checkpoint: Checkpoint) -> None:
    source, (ids, mask) = open_source(tiny_checkpoint()), padded()
    stream = BlockStream(source.decoder, source)
    passage = stream.enter(ids, mask)
    through(stream, passage)
    total, count = stream.losses(passage)
    model = load_model(tiny_checkpoint())
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        mean = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    assert count == 19 + 14 + 3
    assert total / count == pytest.approx(mean, rel=1e-5)


def test_a_model_that_works_between_its_blocks_is_refused() -> None:
    model = make_model()
    model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ArtifactError, match="between its blocks"):
        BlockStream(model).enter(*padded())
    with torch.no_grad():
        model(padded()[0])


def test_hidden_states_go_to_a_file_where_memory_is_short(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, states = BlockStream(make_model()), [torch.randn(2, 3, 4), torch.randn(1, 5, 4)]
    folders: list[Any] = []
    monkeypatch.setattr(block_stream, "carry", lambda tensors, folder: folders.append(folder) or carry(tensors, folder))
    for free, spilled in ((10**9, False), (100, True)):
        monkeypatch.setattr(block_stream, "available_memory", lambda free=free: free)
        copies = stream.carried(states)
        assert all(torch.equal(copy, state) and copy is not state for copy, state in zip(copies, states, strict=True))
        assert (folders[-1] is not None) == spilled


def test_a_file_that_the_disk_has_no_room_for_is_an_error_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_stream.os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="No space left"):
        carry([torch.zeros(3)], tmp_path)


@pytest.mark.parametrize("on_disk", [False, True])
def test_carried_tensors_are_copies_that_can_be_written_to(on_disk: bool, tmp_path: Path) -> None:
    states = [torch.randn(2, 3).bfloat16(), torch.zeros(0, 3), torch.randn(7)]
    copies = carry(states, tmp_path if on_disk else None)
    copies[0].zero_()
    assert float(states[0].abs().sum()) > 0
    assert torch.equal(copies[2], states[2])
    assert copies[1].shape == (0, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_model_that_was_let_go_can_be_run_again(family: str, tiny_checkpoint: Checkpoint) -> None:
    """Weights alone are freed by `release`; a move to the meta device takes the buffers too."""
    source, (ids, mask) = open_source(tiny_checkpoint(family)), padded()
    stream = BlockStream(source.decoder, source, resident=True)
    expected = through(stream, stream.enter(ids, mask))
    for let_go in (release, lambda model: model.to("meta")):
        let_go(source.decoder)
        assert all(weight.is_meta for weight in source.decoder.parameters())
        stream = BlockStream(source.decoder, source)
        assert torch.equal(through(stream, stream.enter(ids, mask)), expected)
