"""Attention measured at first use and remembered on disk."""

import pytest
import torch

from zimage_turbo.engine import measured
from zimage_turbo.kernels.attention import ATTENTION
from zimage_turbo.kernels.registry import Choices

CPU = torch.device("cpu")


def test_the_processor_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "choices_file", lambda: pytest.fail("nothing is to be remembered"))
    assert measured.attention_backend("auto", CPU, torch.float32, 2, 64, 0.0) == "sdpa"
    with pytest.raises(ValueError, match="cudnn: needs an NVIDIA GPU"):
        measured.attention_backend("cudnn", CPU, torch.float32, 2, 64, 0.0)


@pytest.mark.parametrize("spoilt", ["", "[1]", '{"a": 1}', "{"])
def test_a_spoilt_file_is_measured_again(tmp_path, caplog, spoilt):
    file = tmp_path / "attention.json"
    file.write_text(spoilt)
    assert measured.read(file).names == {}
    assert "measured again" in caplog.text and str(file) in caplog.text


def test_choices_come_back(tmp_path):
    file = tmp_path / "folder" / "attention.json"
    assert measured.read(file).names == {}
    measured.write(file, Choices({"one": "cudnn"}))
    measured.write(file, Choices({"one": "cudnn", "two": "triton"}))
    assert measured.read(file).names == {"one": "cudnn", "two": "triton"}
    assert [each.name for each in file.parent.iterdir()] == ["attention.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("allowed_error", [0.0, 0.06])
def test_measured_once(tmp_path, monkeypatch, allowed_error):
    file, counted = tmp_path / "attention.json", []
    monkeypatch.setattr(measured, "choices_file", lambda: file)
    timing = measured.timing
    monkeypatch.setattr(measured, "timing", lambda *given: counted.append(given) or timing(*given))
    asked = "auto", torch.device("cuda"), torch.bfloat16, 30, 128, allowed_error
    measured.attention_backend.cache_clear()
    first = measured.attention_backend(*asked)
    assert ATTENTION.backends[first].error <= allowed_error
    assert first in measured.read(file).names.values()
    calls = len(counted)
    measured.attention_backend.cache_clear()
    assert measured.attention_backend(*asked) == first
    assert calls > 1 and len(counted) == calls
