"""A classifier's folder, read by transformers."""

from pathlib import Path

import pytest
import torch

from nemo_qwen_hidden.errors import ConfigError
from tests.support.models import VOCAB, Tiny, save_tiny


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_decoder_and_the_head(tmp_path: Path, tied: bool) -> None:
    from transformers import Qwen2ForSequenceClassification, Qwen2Model

    from nemo_qwen_hidden.training.losses.classifier_folder import save_classifier

    decoder = save_tiny(tmp_path / "decoder", Tiny(layers=3, groups=2, tied=tied))
    score = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    save_classifier(decoder, score, tmp_path / "classifier", pad_token_id=0)
    model, report = Qwen2ForSequenceClassification.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == 4

    ids = torch.randint(1, VOCAB - 1, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[1, 5:] = 0
    with torch.no_grad():
        states = Qwen2Model.from_pretrained(decoder)(ids, attention_mask=(ids != 0).long()).last_hidden_state
        expected = torch.stack([states[0, 8], states[1, 4]]) @ score.T
        torch.testing.assert_close(model(ids, attention_mask=(ids != 0).long()).logits, expected)

    with pytest.raises(ConfigError, match="must not exist yet"):
        save_classifier(decoder, score, tmp_path / "classifier", pad_token_id=0)
    with pytest.raises(ConfigError, match=r"must have shape \[classes, 64\]"):
        save_classifier(decoder, score[:, :5], tmp_path / "other", pad_token_id=0)
