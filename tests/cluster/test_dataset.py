"""The stages of a dataset's encode, in this process: what is read, rejected, encoded, written, and noted."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from cluster.here import lines_of, make_clip, pictures_of, rows_of, run_here
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save_file

import halovae
from halovae.cluster.decode import DecodeRows, read_latents, write_media
from halovae.cluster.encode import Encode, EncodeRows
from halovae.cluster.facts import Facts
from halovae.cluster.journal import Journal
from halovae.cluster.rules import Rules, parse_buckets
from halovae.cluster.run import allowed
from halovae.cluster.sources import listed, whole_path
from halovae.cluster.writing import NAMES, damage, read_samples
from halovae.io import latents as latents_file
from halovae.io import media


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three clips, one of them in a subfolder, beside files that are no media."""
    folder = tmp_path / "clips"
    for number, (name, frames) in enumerate([("a", 5), ("b", 9), ("deep/c", 5)]):
        make_clip(folder / f"{name}.mp4", frames, 24, 16, seed=number)
    (folder / "a.txt").write_text("a caption")
    (folder / ".hidden.mp4").write_text("")
    return folder


# -- Listing --


def test_a_folder_a_glob_and_one_file_are_listed(clips: Path) -> None:
    assert [item.name for item in listed(str(clips)).items] == ["a.mp4", "b.mp4", "deep/c.mp4"]
    found = listed(f"{clips}/*.mp4")
    assert [item.name for item in found.items] == ["a.mp4", "b.mp4"]
    assert found.root == str(clips)
    assert [item.name for item in listed(f"{clips}/**/*.mp4").items] == ["a.mp4", "b.mp4", "deep/c.mp4"]
    assert [item.name for item in listed(str(clips / "a.mp4")).items] == ["a.mp4"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_has_paths_and_captions(clips: Path, kind: str) -> None:
    import pyarrow as pa
    from pyarrow import csv

    rows = [
        {"caption": "one", "file_name": "deep/c.mp4"},
        {"caption": "two", "file_name": str(clips / "a.mp4")},
        {"caption": "again", "file_name": "b/../a.mp4"},
    ]
    path = clips / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    found = listed(str(path))
    assert [(item.name, dict(item.columns)) for item in found.items] == [
        ("deep/c.mp4", {"caption": "one"}),
        ("a.mp4", {"caption": "two"}),
    ]
    assert [item.path for item in found.items] == [str(clips / "deep/c.mp4"), str(clips / "a.mp4")]
    with pytest.raises(ValueError, match=r"columns caption, file_name; expected one with paths: clip"):
        listed(str(path), "clip")


def test_other_filesystems_are_listed_by_their_urls(clips: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/x/a.mp4", (clips / "a.mp4").read_bytes())
    memory.pipe_file("/set/list.jsonl", b'{"path": "x/a.mp4"}\n')
    for source in ("memory://set", "memory://set/*/*.mp4", "memory://set/list.jsonl"):
        (item,) = listed(source).items
        assert (item.path, item.name[-5:]) == ("memory:///set/x/a.mp4", "a.mp4")


def test_paths_are_whole_for_workers_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert whole_path("out/x") == str(tmp_path / "out/x")
    assert whole_path("memory://out/x") == "memory:///out/x"


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        listed(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds no files that end in \.mp4"):
        listed(str(tmp_path))


# -- Reading --


def test_a_clip_is_read_as_it_is(clips: Path, facts: Facts) -> None:
    (row,) = rows_of(str(clips / "b.mp4"), Rules(facts))
    wanted = pictures_of(clips / "b.mp4")
    assert (row["reason"], row["last"], row["index"]) == ("", True, 0)
    assert torch.equal(torch.from_numpy(row["frames"]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1, wanted)
    meta = json.loads(row["meta"])
    assert (meta["frames"], meta["fps"], meta["size"], meta["source_size"]) == (9, 16.0, [24, 16], [24, 16])
    assert len(meta["source_sha256"]) == 64


def test_a_video_is_cut_into_clips_without_gaps(tmp_path: Path, facts: Facts) -> None:
    make_clip(tmp_path / "a.mp4", 24, 24, 16)
    whole = rows_of(str(tmp_path), Rules(facts, frames=(21,)))[0]["frames"]
    rows = rows_of(str(tmp_path), Rules(facts, frames=(9, 5)))
    assert [len(row["frames"]) for row in rows] == [9, 9, 5]
    assert [row["last"] for row in rows] == [False, False, True]
    assert [json.loads(row["meta"])["start"] for row in rows] == [0, 9, 18]
    assert np.array_equal(np.concatenate([row["frames"] for row in rows])[:21], whole)
    some = rows_of(str(tmp_path), Rules(facts, frames=(9, 5), most=2))
    assert [row["last"] for row in some] == [False, True]
    path = str(tmp_path / "a.mp4")
    assert [row["index"] for row in rows_of(path, Rules(facts, frames=(9, 5)), {path: [0, 2]})] == [1]


def test_a_video_is_scaled_cropped_and_resampled(tmp_path: Path, facts: Facts) -> None:
    make_clip(tmp_path / "a.mp4", 16, 64, 32, fps=32)
    (row,) = rows_of(str(tmp_path), Rules(facts, parse_buckets("24x16,16x24"), (5,), fps=16, most=1))
    assert row["frames"].shape == (5, 16, 24, 3)
    whole = rows_of(str(tmp_path), Rules(facts, frames=(13,)))[0]["frames"]
    smaller = [Image.fromarray(one).resize((32, 16), Image.Resampling.BICUBIC).crop((4, 0, 28, 16)) for one in whole]
    errors = [[np.abs(np.asarray(one).astype(int) - frame).mean() for one in smaller] for frame in row["frames"]]
    assert np.argmin(errors, axis=1).tolist() == [0, 2, 4, 6, 8]


def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, facts: Facts) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    (row,) = rows_of(str(tmp_path), Rules(facts))
    assert np.array_equal(row["frames"][0], np.rot90(np.asarray(picture), -1))


def bad_inputs(folder: Path) -> dict[str, str]:
    """Write inputs that cannot be encoded. Returns what is said of each."""
    make_clip(folder / "good.mp4", 5, 24, 16)
    whole = (folder / "good.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    (folder / "text.png").write_text("no picture")
    (folder / "huge.mkv").write_bytes(b"\0" * 3000)
    make_clip(folder / "tiny.mp4", 5, 6, 6)
    make_clip(folder / "still.mp4", 1, 24, 16)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return {
        "truncated.mp4": "cannot be read (InvalidDataError", "empty.mp4": "is empty",
        "text.mp4": "cannot be read (InvalidDataError", "text.png": "cannot be read (UnidentifiedImageError",
        "huge.mkv": "has 3,000 bytes, more than 2,999", "tiny.mp4": "6x6 is too small",
        "sound.mp4": "has no video stream", "still.mp4": "has 1 frames, fewer than 5", "good.mp4": "",
    }  # fmt: skip


def test_bad_inputs_are_rejected_with_a_reason(tmp_path: Path, facts: Facts) -> None:
    expected = bad_inputs(tmp_path)
    rows = rows_of(str(tmp_path), Rules(facts, frames=(5,), max_bytes=2999))
    said = {json.loads(row["meta"])["name"]: row["reason"] for row in rows}
    assert said.keys() == expected.keys()
    assert {name: reason for name, reason in said.items() if not reason.startswith(expected[name])} == {}
    assert said["good.mp4"] == ""


def test_a_file_of_a_manifest_that_is_gone_is_rejected(tmp_path: Path, facts: Facts) -> None:
    (tmp_path / "list.jsonl").write_text('{"path": "gone.mp4"}\n')
    (row,) = rows_of(str(tmp_path / "list.jsonl"), Rules(facts))
    assert row["reason"] == "there is no such file"


def test_a_video_that_breaks_off_keeps_its_whole_clips(tmp_path: Path, facts: Facts) -> None:
    make_clip(tmp_path / "whole.mp4", 64, 48, 32)
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as made:  # fmt: skip # noqa: E501
        stream = made.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: int(len(whole) * 0.6)])
    rows = rows_of(str(tmp_path / "a.mp4"), Rules(facts, frames=(5,)))
    assert 0 < len(rows) - 1 < 12
    assert [bool(row["reason"]) for row in rows] == [False] * (len(rows) - 1) + [True]
    assert "is truncated" in rows[-1]["reason"] or "cannot be read" in rows[-1]["reason"]


def test_a_tar_has_clips_with_captions(tmp_path: Path, clips: Path, facts: Facts) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for key, name in (("x/one", "a.mp4"), ("two", "b.mp4")):
            tar.add(clips / name, f"{key}.mp4")
            for suffix, text in (("txt", f"caption of {key}"), ("json", '{"n": 1}')):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
    rows = rows_of(str(tmp_path / "shard.tar"), Rules(facts, frames=(5,)))
    metas = [json.loads(row["meta"]) for row in rows]
    assert [(meta["name"], meta["member"], meta["clip"]) for meta in metas] == [
        ("shard.tar/x/one.mp4", "x/one.mp4", 0),
        ("shard.tar/two.mp4", "two.mp4", 0),
    ]
    assert [row["index"] for row in rows] == [0, 1]
    assert metas[0]["columns"] == {"txt": "caption of x/one", "json": {"n": 1}}
    (alone,) = rows_of(str(clips / "a.mp4"), Rules(facts, frames=(5,)))
    assert np.array_equal(alone["frames"], rows[0]["frames"])


def test_names_in_a_tar_stay_in_the_folder_and_are_used_once(
    tmp_path: Path, clips: Path, facts: Facts, encoder: EncodeRows
) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/shard.tar", "w") as tar:
        for name in ("../../../out.mp4", "/out2.mp4", "same.mp4", "same.mp4"):
            member = tarfile.TarInfo(name)
            member.size = (clips / "a.mp4").stat().st_size
            tar.addfile(member, io.BytesIO((clips / "a.mp4").read_bytes()))
    run_here(str(tmp_path / "in"), str(tmp_path / "made"), Rules(facts), encoder)
    assert sorted(line["file"] for line in lines_of(tmp_path / "made")) == [
        f"shard.tar/{name}.00000.safetensors" for name in ("out.mp4", "out2.mp4", "same.mp4")
    ]
    assert [line["reason"] for line in lines_of(tmp_path / "made", "rejected.jsonl")] == ["its name is there twice"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_a_folder_that_hugging_face_saved_has_pictures_and_captions(tmp_path: Path, facts: Facts) -> None:
    import pyarrow as pa

    pixels = [np.random.default_rng(number).integers(0, 256, (16, 24, 3), np.uint8) for number in range(2)]
    rows = []
    for number, one in enumerate(pixels):
        content = io.BytesIO()
        Image.fromarray(one).save(content, format="png")
        rows.append({"image": {"bytes": content.getvalue(), "path": None}, "text": f"caption {number}"})
    table = pa.Table.from_pylist(rows)
    folder = tmp_path / "saved"
    folder.mkdir()
    path = str(folder / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    made = rows_of(str(folder), Rules(facts))
    assert [row["reason"] for row in made] == ["", ""]
    assert all(np.array_equal(row["frames"][0], one) for row, one in zip(made, pixels, strict=True))
    metas = [json.loads(row["meta"]) for row in made]
    assert [meta["columns"] for meta in metas] == [{"text": "caption 0"}, {"text": "caption 1"}]
    assert len({meta["name"] for meta in metas}) == 2


# -- Encoding --


def test_a_batch_of_several_sizes_equals_encodes_of_each_alone(clips: Path, wan: Path) -> None:
    make_clip(clips / "wide.mp4", 5, 32, 16, seed=7)
    vae = halovae.load(wan)
    paths = [clips / name for name in ("a.mp4", "wide.mp4", "b.mp4", "deep/c.mp4")]
    frames = [media.read_clip(path)[0].permute(1, 2, 3, 0).numpy() for path in paths]
    found = Encode(wan)({"frames": frames, "name": [path.name for path in paths]})
    assert found["name"] == [path.name for path in paths]
    assert "frames" not in found
    for path, latents in zip(paths, found["latents"], strict=True):
        moments = vae.encode(pictures_of(path))
        assert moments is not None
        assert np.abs(latents - moments[0, : moments.shape[1] // 2].numpy()).max() <= 1e-5


def test_samples_have_the_distribution_and_do_not_depend_on_the_batch(wan: Path) -> None:
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (1, 64, 64, 3), np.uint8) for _ in range(2)]
    both = Encode(wan, store="both")({"frames": frames})
    sampled = Encode(wan, store="sample")({"frames": frames})["latents"]
    again = Encode(wan, store="sample", batch_size=1)({"frames": frames[1:]})["latents"]
    assert np.abs(sampled[1] - again[0]).max() <= 1e-5
    noise = (sampled[0] - both["latents"][0]) / both["latents_std"][0]
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1) < 0.15
    other = Encode(wan, store="sample", seed=1)({"frames": frames})["latents"]
    assert np.abs(other[0] - sampled[0]).max() > 0.01


@pytest.mark.parametrize("model", ["wan2.1", "flux"])
def test_normalized_latents_are_what_pipelines_denormalize(models: Callable[[str], Path], model: str) -> None:
    path = models(model) / "vae"
    frames = [np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)]
    raw = Encode(path, store="both")({"frames": frames})
    scaled = Encode(path, store="both", normalize=True)({"frames": frames})
    vae = halovae.load(path)
    latents, wanted = torch.from_numpy(scaled["latents"][0])[None], torch.from_numpy(raw["latents"][0])[None]
    decoded, expected = vae.decode(latents, denormalize=True), vae.decode(wanted)
    assert decoded is not None
    assert expected is not None
    assert (decoded - expected).abs().max() <= 1e-4
    factor = scaled["latents_std"][0] / raw["latents_std"][0]
    assert np.allclose(factor.std(axis=tuple(range(1, factor.ndim))), 0, atol=1e-5)


def test_what_is_no_picture_is_refused(wan: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'frames': float32 of shape \[1, 8, 8, 3\]; expected uint8"):
        Encode(wan)({"frames": [np.zeros((1, 8, 8, 3), np.float32)]})
    with pytest.raises(ValueError, match="store='mode'"):
        Encode(wan, store="mode")  # type: ignore[arg-type]


def test_what_memory_does_not_suffice_for_is_rejected_alone(
    wan: Path, encoder: EncodeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = encoder._encode.encode

    def encode(pictures: list[np.ndarray]) -> object:
        if len(pictures) > 1 or pictures[0].max() == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(pictures)

    monkeypatch.setattr(encoder._encode, "encode", encode)
    frames = [np.full((1, 8, 8, 3), value, np.uint8) for value in (1, 9, 2)]
    found = encoder({"frames": frames, "reason": ["", "", ""], "name": ["a", "b", "c"]})
    assert found["reason"] == ["", "memory does not suffice to encode 1x8x8 (frames, rows, cols)", ""]
    assert [one.shape for one in found["latents"]] == [(16, 1, 1, 1), (1, 1, 1, 1), (16, 1, 1, 1)]


def test_latents_that_are_not_finite_are_rejected(encoder: EncodeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.full((1, 1, 1, 1), np.inf), np.zeros(0)
    monkeypatch.setattr(encoder._encode, "encode", lambda pictures: [broken] * len(pictures))
    found = encoder({"frames": [np.zeros((1, 8, 8, 3), np.uint8)], "reason": [""]})
    assert found["reason"] == ["latents hold NaN or infinite values: another dtype may help"]


# -- Writing, and what is noted --


def test_a_file_of_a_sample_is_a_latents_file_with_all_metadata(
    clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows, wan: Path
) -> None:
    out = tmp_path / "out"
    run_here(str(clips), str(out), Rules(facts), encoder)
    header = latents_file.read_header(out / "deep/c.mp4.00000.safetensors")
    assert (header.shape, header.family, header.scaled, header.fps) == ((1, 16, 2, 2, 3), "wan2.1", False, 16.0)
    moments = halovae.load(wan).encode(pictures_of(clips / "deep/c.mp4"))
    assert moments is not None
    assert (latents_file.read(out / "deep/c.mp4.00000.safetensors") - moments[:, :16]).abs().max() <= 1e-5
    with safe_open(out / "deep/c.mp4.00000.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == str(clips / "deep/c.mp4")
    assert {"source_sha256", "size", "frames", "fps", "family", "revision", "dtype", "source_size"} <= metadata.keys()


@pytest.mark.parametrize(("format_", "suffix"), [("parquet", ".parquet"), ("webdataset", ".tar")])
def test_shards_hold_what_files_of_samples_hold(
    clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows, format_: str, suffix: str
) -> None:
    make_clip(clips / "long.mp4", 10, 24, 16, seed=3)
    rules = Rules(facts, frames=(5,))
    run_here(str(clips), str(tmp_path / "one"), rules, encoder)
    run_here(str(clips), str(tmp_path / "many"), rules, encoder, format_=format_)
    wanted = {(line["item"], line["index"]): line["sha256"] for line in lines_of(tmp_path / "one")}
    lines = lines_of(tmp_path / "many")
    assert {(line["item"], line["index"]): line["sha256"] for line in lines} == wanted
    assert {line["file"] for line in lines} == {path.name for path in (tmp_path / "many").glob(f"*{suffix}")}
    for name in {line["file"] for line in lines}:
        assert list(damage([line for line in lines if line["file"] == name], str(tmp_path / "many"))) == []


@pytest.mark.parametrize("format_", ["safetensors", "parquet", "webdataset"])
def test_files_hold_the_deviation_beside_the_mean_if_both_are_asked_for(
    clips: Path, tmp_path: Path, facts: Facts, wan: Path, format_: str
) -> None:
    (clips / "bad.mp4").write_text("bad")
    out = tmp_path / "out"
    run_here(str(clips), str(out), Rules(facts), EncodeRows(4, model=str(wan), store="both"), format_=format_)
    lines = lines_of(out)
    assert [line["name"] for line in lines_of(out, "rejected.jsonl")] == ["bad.mp4"]
    for name in {line["file"] for line in lines}:
        assert list(damage([line for line in lines if line["file"] == name], str(out))) == []
        for line, tensors in read_samples((out / name).read_bytes(), Path(name).suffix):
            moments = halovae.load(wan).encode(pictures_of(Path(line["source"])))
            assert moments is not None
            mean, log_variance = moments[0].chunk(2)
            assert (tensors["latents"] - mean).abs().max() <= 1e-5
            assert (tensors["std"] - (log_variance.clamp(-30, 20) / 2).exp()).abs().max() <= 1e-5


def test_parquet_has_a_column_for_bytes_shape_and_dtype(
    clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows
) -> None:
    run_here(str(clips / "a.mp4"), str(tmp_path / "out"), Rules(facts), encoder, format_="parquet", dtype="bf16")
    (row,) = [row for file in (tmp_path / "out").glob("*.parquet") for row in parquet.read_table(file).to_pylist()]
    latents = torch.frombuffer(bytearray(row["latents_bytes"]), dtype=torch.bfloat16).view(row["shape"])
    assert (row["dtype"], latents.shape, row["source"]) == ("bf16", (16, 2, 2, 3), str(clips / "a.mp4"))


def test_webdataset_has_keys_as_its_readers_expect(
    clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows
) -> None:
    run_here(str(clips / "a.mp4"), str(tmp_path / "out"), Rules(facts), encoder, format_="webdataset")
    (shard,) = (tmp_path / "out").glob("*.tar")
    with tarfile.open(shard) as tar:
        assert tar.getnames() == ["a_mp4_00000.json", "a_mp4_00000.safetensors"]


@pytest.mark.parametrize("format_", ["safetensors", "parquet"])
def test_a_run_that_was_ended_at_any_batch_goes_on(
    clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows, format_: str
) -> None:
    make_clip(clips / "long.mp4", 10, 24, 16, seed=3)
    (clips / "bad.mp4").write_text("bad")
    rules, out = Rules(facts, frames=(5,)), tmp_path / "out"
    for stop in (0, 1, 1):  # files without lines are left each time
        run_here(str(clips), str(out), rules, encoder, stop_after=stop, format_=format_)
    with (out / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"item": "cut sho')  # a line that a crash cut short
    (out / ".a.0123abcd.partial").write_text("cut")
    for name in ("notes.parquet", "lora.safetensors", "notes.partial"):
        (out / name).write_text("the user's")
    assert run_here(str(clips), str(out), rules, encoder, format_=format_) == 3
    lines = lines_of(out)
    found = sorted((line["name"], line["clip"]) for line in lines)
    assert found == [("a.mp4", 0), ("b.mp4", 0), ("deep/c.mp4", 0), ("long.mp4", 0), ("long.mp4", 1)]
    assert [line["name"] for line in lines_of(out, "rejected.jsonl")] == ["bad.mp4"]
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".safetensors", ".parquet")}
    assert files == {line["file"] for line in lines} | {"notes.parquet", "lora.safetensors"}
    assert [path.name for path in out.rglob("*.partial")] == ["notes.partial"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix != ".lock"}
    assert run_here(str(clips), str(out), rules, encoder, format_=format_) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix != ".lock"} == before


def test_a_clip_of_a_video_that_is_missing_is_made_alone(tmp_path: Path, facts: Facts, encoder: EncodeRows) -> None:
    make_clip(tmp_path / "in/a.mp4", 15, 24, 16)
    rules, out = Rules(facts, frames=(5,)), tmp_path / "out"
    run_here(str(tmp_path / "in"), str(out), rules, encoder)
    lines = lines_of(out)
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["clip"] != 1))
    kept = (out / lines[0]["file"]).stat().st_mtime_ns
    assert run_here(str(tmp_path / "in"), str(out), rules, encoder) == 1
    made = sorted(lines_of(out), key=lambda line: int(line["clip"]))
    assert [{**line, "sha256": ""} for line in made] == [{**line, "sha256": ""} for line in lines]
    assert (out / lines[0]["file"]).stat().st_mtime_ns == kept


def test_an_object_store_gets_lines_in_files_of_their_own(clips: Path, facts: Facts, encoder: EncodeRows) -> None:
    import fsspec

    out = f"memory://{clips}/out"
    run_here(str(clips), out, Rules(facts), encoder, stop_after=2)
    assert run_here(str(clips), out, Rules(facts), encoder) == 1
    assert run_here(str(clips), out, Rules(facts), encoder) == 0
    memory = fsspec.filesystem("memory")
    names = memory.glob(f"{out}/manifest*.jsonl")
    lines = [json.loads(line) for name in names for line in memory.cat(name).splitlines()]
    assert sorted(line["name"] for line in lines) == ["a.mp4", "b.mp4", "deep/c.mp4"]
    assert all(not list(damage([line], out)) for line in lines)


@pytest.mark.parametrize("format_", ["safetensors", "parquet", "webdataset"])
def test_a_dataset_is_decoded_to_what_its_latents_decode_to(
    clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows, wan: Path, format_: str
) -> None:
    (clips / "b.mp4").unlink()
    (clips / "deep/c.mp4").unlink()
    make_clip(clips / "still.mp4", 1, 24, 16, seed=9)
    (clips / "bad.mp4").write_text("bad")
    out, made = tmp_path / "out", tmp_path / "made"
    run_here(str(clips), str(out), Rules(facts), encoder, format_=format_)
    suffixes = (".safetensors", ".parquet", ".tar")
    decoder, lines = DecodeRows(str(wan), "fp32", None), []
    for item in listed(str(out), suffixes=suffixes).items:
        for batch in read_latents({"path": [item.path], "name": [item.name], "done": ["[]"]}):
            lines += [json.loads(line) for line in write_media(decoder(batch), str(made), None)["line"]]
    names = ["a.mp4", "still.mp4"]
    files = [f"{name}.00000.{'png' if name == 'still.mp4' else 'mp4'}" for name in names]
    assert sorted(line["file"] for line in lines) == files
    assert {line["fps"] for line in lines} == {16.0}
    vae = halovae.load(wan)
    for name, file in zip(names, files, strict=True):
        moments = vae.encode(pictures_of(clips / name))
        assert moments is not None
        frames = vae.decode(moments[:, :16], dtype=torch.uint8)
        assert frames is not None
        sink = media.Sink(tmp_path / f"wanted{file[-4:]}", 16)
        sink.write(frames[0])
        sink.close(whole=True)
        difference = media.read_clip(made / file)[0].int() - media.read_clip(sink.path)[0].int()
        assert difference.abs().float().mean() < 0.5  # a rounded value may fall on the other side
    assert [one for line in lines for one in damage([line], str(made))] == []
    (made / files[0]).write_bytes(b"changed")
    assert [line["file"] for line in lines for _ in damage([line], str(made))] == [files[0]]


def test_what_holds_no_latents_is_rejected(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("no safetensors")
    for name, words in (("weights", "expected a tensor 'latents'"), ("text", "cannot be read")):
        path = str(tmp_path / f"{name}.safetensors")
        (batch,) = read_latents({"path": [path], "name": [name], "done": ["[]"]})
        assert words in batch["reason"][0]


@pytest.mark.parametrize("hurt", ["cut", "gone", "changed"])
def test_damaged_samples_are_found_and_made_again(
    clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows, hurt: str
) -> None:
    out = tmp_path / "out"
    run_here(str(clips), str(out), Rules(facts), encoder)
    path = out / "b.mp4.00000.safetensors"
    content, wanted = path.read_bytes(), latents_file.read(path).clone()
    path.unlink() if hurt == "gone" else path.write_bytes(content[:-3] + (b"" if hurt == "cut" else b"abc"))
    found = [one for line in lines_of(out) for one in damage([line], str(out))]
    assert [line["name"] for line, _ in found] == ["b.mp4"]
    assert "b.mp4.00000.safetensors" in found[0][1]
    settings = json.loads((out / "dataset.json").read_text())
    assert Journal(str(out), settings, NAMES["safetensors"]).drop(lambda line: line["name"] == "b.mp4") == 1
    assert run_here(str(clips), str(out), Rules(facts), encoder) == 1
    assert torch.equal(latents_file.read(path), wanted)


def test_samples_of_one_folder_are_made_alike(clips: Path, tmp_path: Path, facts: Facts, encoder: EncodeRows) -> None:
    out = tmp_path / "out"
    run_here(str(clips), str(out), Rules(facts), encoder)
    with pytest.raises(ValueError, match=r"was made with frames \[\], not \[5\]: name another folder"):
        run_here(str(clips), str(out), Rules(facts, frames=(5,)), encoder)
    with pytest.raises(ValueError, match=r"holds files that are of no dataset, such as a\.mp4"):
        run_here(str(clips), str(clips), Rules(facts), encoder)


def test_the_share_of_rejections_is_of_all_inputs() -> None:
    assert allowed("1%", 200) == 2
    assert allowed("3", 200) == 3
    assert allowed(None, 200) == float("inf")
    for text in ("-1", "x%", "inf"):
        with pytest.raises(ValueError, match="expected a number of inputs, or a share such as 1%"):
            allowed(text, 200)


def test_a_model_of_pictures_takes_pictures(models: Callable[[str], Path], tmp_path: Path) -> None:
    path = models("flux") / "vae"
    facts = Facts.read(path)
    assert (facts.clips, facts.framed) == (False, False)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32 + 8 * number, 3), np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"in/{number}.png")
    output = tmp_path / "out"
    run_here(str(tmp_path / "in"), str(output), replace(Rules(facts), most=1), EncodeRows(3, model=str(path)))
    assert [line["shape"] for line in lines_of(output)] == [[16, 8, 8], [16, 8, 10], [16, 8, 12]]
