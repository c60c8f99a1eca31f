"""A batch as PNG files: the host's rounding, whole files or none."""

import io

import numpy as np
import pytest
import torch
from comfy_api.latest import ui
from PIL import Image

from zimage_turbo.engine import pictures


def images(count: int = 1, height: int = 40, width: int = 24, channels: int = 3) -> torch.Tensor:
    """Values on both sides of 0 and 1 too."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, height, width, channels, generator=generator) * 1.2 - 0.1


def by_host(image: torch.Tensor) -> np.ndarray:
    return np.asarray(ui.ImageSaveHelper._convert_tensor_to_pil(image))


def decoded(path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_are_rounded_as_the_host_rounds_them(dtype):
    image = images(height=300, width=300)[0].to(dtype)
    image[0, :3, 0] = torch.tensor([float("inf"), float("-inf"), 1.0])
    assert np.array_equal(pictures.levels(image).numpy(), by_host(image))


def test_every_level_survives():
    image = (torch.arange(256) / 255).reshape(16, 16, 1).expand(16, 16, 3)
    assert np.array_equal(pictures.levels(image).numpy(), by_host(image))


@pytest.mark.parametrize("channels", [3, 4])
def test_each_picture_lies_in_its_file_and_is_counted(tmp_path, channels):
    batch = images(5, channels=channels)
    paths, saved = [tmp_path / f"{number}.png" for number in range(5)], []
    pictures.save(batch, paths, {"prompt": "x"}, 2, lambda: saved.append(sorted(tmp_path.iterdir())))
    assert [len(files) for files in saved] == [1, 2, 3, 4, 5]
    assert saved[-1] == paths
    for image, path in zip(batch, paths, strict=True):
        assert np.array_equal(decoded(path), by_host(image))


def test_the_decoders_layout_is_understood(tmp_path):
    planes = images(2, 3, 40, 24)  # [pictures, channels, height, width]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    pictures.save(planes.movedim(1, -1), paths, {}, 2)
    assert np.array_equal(decoded(paths[1]), by_host(planes[1].movedim(0, -1)))


def test_a_full_disc_leaves_the_pictures_that_fitted_and_no_part(tmp_path):
    resource = pytest.importorskip("resource")
    batch = torch.cat((torch.zeros(1, 200, 200, 3), images(1, 200, 200)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            pictures.save(batch, [tmp_path / "0.png", tmp_path / "1.png"], {}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


def test_a_cancelled_batch_leaves_whole_files(tmp_path):
    def cancel():
        raise InterruptedError

    batch = images(3)
    with pytest.raises(InterruptedError):
        pictures.save(batch, [tmp_path / f"{number}.png" for number in range(3)], {}, 2, cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    assert np.array_equal(decoded(tmp_path / "0.png"), by_host(batch[0]))


@pytest.mark.parametrize("shape", [(40, 24, 3), (1, 40, 24, 1), (0, 40, 24, 3), (1, 2, 40, 24, 3), (1, 0, 24, 3)])
def test_what_is_no_image_is_named(shape):
    with pytest.raises(ValueError, match=r"images has the shape \[.*Connect the IMAGE"):
        pictures.check(torch.zeros(shape))
