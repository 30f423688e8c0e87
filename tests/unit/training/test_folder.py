"""The run's folder and what a run is begun with."""

from pathlib import Path

from vilseg.data.pairs import Shard
from vilseg.text.nouns import NounPhrases
from vilseg.text.tokenizer import FixedTokenizer, train_tokenizer
from vilseg.training.folder import Prepared, RunFolder, checkpoint_name


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    assert folder.checkpoint_steps() == []
    for step in (1000, 20, 300):
        (tmp_path / "run" / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / checkpoint_name(step) / "state.pt").write_bytes(b"x")
    (tmp_path / "run" / "checkpoints" / ".trainer").write_bytes(b"x")
    assert folder.checkpoint_steps() == [20, 300, 1000]
    assert folder.checkpoint(20).endswith("run/checkpoints/step-00000020")


def test_what_a_run_is_begun_with_survives_json() -> None:
    tokenizer = train_tokenizer(["a dog", "Käfer"], 100)
    fixed = FixedTokenizer(tokenizer.backend_tokenizer.to_str(), 9, tokenizer.pad_token_id)
    prepared = Prepared((Shard("s3://b/0.tar", 3), Shard("s3://b/1.tar", 0)), NounPhrases(("dog",), {"dogs": 0}), fixed)
    again = Prepared.from_json(prepared.to_json())
    assert again == prepared
    assert again.tokenizer(["a dog"]).tolist() == fixed(["a dog"]).tolist()
