from itertools import islice

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from transformers import AutoImageProcessor

from apt import AptError
from apt.inputs.images import ImageReader
from apt.inputs.texts import TextReader
from apt.plugin.registry import registry

SPLITS = ("calibration", "evaluation")


@pytest.fixture
def processor(model_of):
    return AutoImageProcessor.from_pretrained(model_of("vit"))


def read(reader, source, count=8, seed=0, **options):
    return reader.read(str(source), "calibration", count, seed, registry(), **options)


def test_images_of_subfolders_are_what_the_processor_makes_of_them(processor, images):
    samples = read(ImageReader(processor), images, 12)
    paths = [p for p in images.rglob("*") if p.suffix in (".png", ".jpg")]
    expected = {
        float(processor(images=Image.open(p), return_tensors="pt")["pixel_values"].sum())
        for p in paths
    }
    assert samples.names == ("pixel_values",)
    assert {float(each["pixel_values"].sum()) for each in samples} == expected


def test_the_seed_draws_the_images(processor, images):
    digests = [read(ImageReader(processor), images, seed=seed).digest() for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_an_image_has_the_text_beside_it_or_a_builtin_one(processor, images, tokenizer):
    reader = ImageReader(processor, texts=TextReader(tokenizer, 16))
    texts = [tokenizer.decode(each["input_ids"]) for each in read(reader, images, 12)]
    beside = [text for text in texts if "the image number" in text]
    assert len(beside) == 6
    assert len(set(texts)) > 9


def test_texts_are_filled_where_the_model_reads_the_padding(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    ids = TextReader(tokenizer, 16, padded=True).encode(("two words",))["input_ids"]
    assert len(ids) == 16
    assert ids[-1] == tokenizer.pad_token_id


def test_images_in_a_parquet_file(processor, images, tmp_path):
    rows = [{"bytes": p.read_bytes(), "path": p.name} for p in sorted(images.rglob("*.png"))]
    place = tmp_path / "images.parquet"
    parquet.write_table(pa.table({"label": list(range(6)), "image": rows}), place)
    samples = read(ImageReader(processor), place, 6)
    files = read(ImageReader(processor), images, 12)
    known = {float(each["pixel_values"].sum()) for each in files}
    assert len({float(each["pixel_values"].sum()) for each in samples} & known) == 6


def test_a_parquet_file_without_images(processor, tmp_path):
    place = tmp_path / "texts.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"]}), place)
    with pytest.raises(AptError, match=r"row 1 of .*texts\.parquet has no column of images"):
        read(ImageReader(processor), place)


@pytest.mark.parametrize("source", ["builtin:code", "BuiltIn:Code", "text.jsonl"])
def test_texts_are_no_images(processor, source):
    with pytest.raises(AptError, match=f"{source} has texts, and the model takes images") as error:
        read(ImageReader(processor), source)
    assert error.value.hint.startswith("give a folder of .png")


def test_an_empty_folder(processor, tmp_path):
    with pytest.raises(AptError, match="has no images"):
        read(ImageReader(processor), tmp_path)


def test_too_few_images(processor, images):
    with pytest.raises(AptError, match="has 12 images, but 13 are needed"):
        read(ImageReader(processor), images, 13)
    assert len(read(ImageReader(processor), images, 13, fewer=True)) == 12


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_an_unreadable_image_is_named(processor, images, content):
    (images / "broken.png").write_bytes(content)
    with pytest.raises(AptError, match=r"broken\.png cannot be read as an image") as error:
        read(ImageReader(processor), images, 13)
    assert "\n" not in str(error.value)


def test_a_missing_folder(processor):
    with pytest.raises(AptError, match="no such folder"):
        read(ImageReader(processor), "./nowhere")


def test_grey_images_and_palettes_have_three_channels(processor, tmp_path):
    Image.new("L", (20, 20), 7).save(tmp_path / "grey.png")
    Image.new("P", (20, 20), 7).save(tmp_path / "palette.gif")
    shapes = {each["pixel_values"].shape for each in read(ImageReader(processor), tmp_path, 2)}
    assert shapes == {torch.Size([3, 16, 16])}


def test_embedded_pictures_have_two_splits(processor):
    texts = registry().calibrations.get("builtin")
    items = {s: list(islice(texts.items(texts.images, s), 16)) for s in SPLITS}
    names = {split: {item.name.split()[-1] for item in found} for split, found in items.items()}
    assert [len(names[split]) for split in SPLITS] == [8, 3]
    assert not names["calibration"] & names["evaluation"]
    again = list(islice(texts.items(texts.images, "calibration"), 16))
    assert [item.stored for item in again] == [item.stored for item in items["calibration"]]
    samples = read(ImageReader(processor), "builtin", 40)
    assert len({float(each["pixel_values"].sum()) for each in samples}) == 40
