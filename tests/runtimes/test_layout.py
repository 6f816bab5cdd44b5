"""How artifacts lie on disk: versions, descriptions and formats; real files, no frameworks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mesh.core.errors import Code, LoadFailed
from mesh.runtimes.api import ModelSpec, VersionedModel
from mesh.runtimes.layout import DESCRIPTION_MAX_BYTES, VERSIONS_MAX, Layout, lay_out
from mesh.runtimes.registry import RuntimeRegistry

from .models import matmul

Files = dict[str, str]


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def told(layout: Layout, root: Path) -> tuple[str, dict[str, str]]:
    """The format, and each version's path inside the artifact; the latest first."""
    paths = {one.name: str(one.path.relative_to(root)) for one in layout.versions}
    return layout.format, paths


def refused(folder: Path, model_type: str = "auto") -> str:
    with pytest.raises(LoadFailed) as caught:
        lay_out(folder, model_type, "m")
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert caught.value.message.startswith("model 'm': ")
    assert str(folder) not in caught.value.message, "where it lies is nobody's business"
    return caught.value.message


ONNX = 'platform: "onnxruntime_onnx" '
SKLEARN = '"implementation": "mlserver_sklearn.SKLearnModel"'

LAID_OUT = [
    pytest.param({"model.onnx": ""}, "onnx", {"": "."}, id="a folder"),
    pytest.param({"iris.onnx": "", ".x.skops": ""}, "onnx", {"": "."}, id="a hidden file"),
    pytest.param(
        {"1/model.onnx": "", "2/model.onnx": "", "10/model.onnx": ""},
        "onnx", {"10": "10", "2": "2", "1": "1"}, id="versions by number, not by text",
    ),
    pytest.param(
        {"1/model.onnx": "", "README.md": "", "SHA256SUMS": "", "readme.txt": "a tree\n"},
        "onnx", {"1": "1"}, id="sums and a read me beside one version",
    ),
    pytest.param({"0001/saved_model.pb": ""}, "tensorflow", {"1": "0001"}, id="leading zeros"),
    pytest.param(
        {"model.onnx": "", "1/other.onnx": ""}, "onnx", {"": "."}, id="a model beside a number"
    ),
    pytest.param(
        {"1/model.onnx": "", ".2/model.pt": "", "latest/x.pt": "", "3.5/x.pt": ""},
        "onnx", {"1": "1"}, id="folders that are no versions",
    ),
    pytest.param(
        {"config.pbtxt": ONNX, "1/model.onnx": "", "2/model.onnx": ""},
        "onnx", {"2": "2", "1": "1"}, id="a config.pbtxt without a policy",
    ),
    pytest.param(
        {"config.pbtxt": 'backend: "python"', "1/model.py": "", "1/net.pt": ""},
        "python", {"1": "1"}, id="a description where files are ambiguous",
    ),
    pytest.param(
        {"config.pbtxt": "max_batch_size: 8", "1/model.pt": ""},
        "pytorch", {"1": "1"}, id="a description that says no format",
    ),
    pytest.param(
        {"config.pbtxt": "version_policy { latest { num_versions: 2 } }",
         "1/a.onnx": "", "2/a.onnx": "", "3/a.onnx": ""},
        "onnx", {"3": "3", "2": "2"}, id="the latest two",
    ),
    pytest.param(
        {"config.pbtxt": "version_policy { latest { } }", "1/a.onnx": "", "2/a.onnx": ""},
        "onnx", {"2": "2"}, id="the latest, without a number",
    ),
    pytest.param(
        {"config.pbtxt": "version_policy: { all { } }", "1/a.onnx": "", "2/a.onnx": ""},
        "onnx", {"2": "2", "1": "1"}, id="all versions",
    ),
    pytest.param(
        {"config.pbtxt": "version_policy: { specific: { versions: [1, 3] } }",
         "1/a.onnx": "", "2/a.onnx": "", "3/a.onnx": ""},
        "onnx", {"3": "3", "1": "1"}, id="specific versions",
    ),
    pytest.param(
        {"config.pbtxt": 'default_model_filename: "net.onnx"', "1/net.onnx": "", "1/a.onnx": ""},
        "onnx", {"1": "1/net.onnx"}, id="a file that the config names",
    ),
    pytest.param(
        {"config.pbtxt": ONNX + 'default_model_filename: "weights"', "weights": ""},
        "onnx", {"": "weights"}, id="a config beside the file itself",
    ),
    pytest.param(
        {"config.pbtxt": "", "1/model.savedmodel/saved_model.pb": ""},
        "tensorflow", {"1": "1/model.savedmodel"}, id="Triton's folder of a SavedModel",
    ),
    pytest.param(
        {"config.pbtxt": 'platform: "tensorflow_savedmodel"',
         "1/model.savedmodel/saved_model.pb": "", "2/saved_model.pb": ""},
        "tensorflow", {"2": "2", "1": "1/model.savedmodel"}, id="a SavedModel in both ways",
    ),
    pytest.param(
        {"model-settings.json": "{" + SKLEARN + "}", "model.joblib": ""},
        "sklearn", {"": "."}, id="settings without a place",
    ),
    pytest.param(
        {"model-settings.json": "{" + SKLEARN + ', "parameters": {"uri": "./a/fit.joblib"}}',
         "a/fit.joblib": "", "b.joblib": ""},
        "sklearn", {"": "a/fit.joblib"}, id="a file that settings name",
    ),
    pytest.param(
        {"model-settings.json": '{"parameters": {"uri": "1", "version": "v1.2"}}',
         "1/model.skops": "", "2/model.skops": ""},
        "sklearn", {"v1.2": "1"}, id="a folder and a version that settings name",
    ),
    pytest.param(
        {"1/model-settings.json": '{"parameters": {"uri": "x.bst", "version": "first"}}',
         "1/x.bst": "tree\n", "2/model-settings.json": "{}", "2/y.bst": "tree\n"},
        "lightgbm", {"2": "2", "first": "1/x.bst"}, id="settings in each version",
    ),
    pytest.param(
        {"model-settings.json": "{" + SKLEARN + "}", "1/m.skops": "", "2/m.skops": ""},
        "sklearn", {"2": "2", "1": "1"}, id="settings beside the versions",
    ),
    pytest.param(
        {"model.skops": "", "model.joblib": ""}, "sklearn", {"": "."}, id="one model, twice"
    ),
]  # fmt: skip


@pytest.mark.parametrize("model_type", ["auto", "triton", "mlserver"])
@pytest.mark.parametrize(("files", "form", "versions"), LAID_OUT)
def test_an_artifact_is_laid_out(
    tmp_path: Path, model_type: str, files: Files, form: str, versions: dict[str, str]
) -> None:
    layout = lay_out(write(tmp_path, files), model_type, "m")
    assert told(layout, tmp_path) == (form, versions)
    assert list(told(layout, tmp_path)[1]) == list(versions), "the latest is the first"


@pytest.mark.parametrize(("files", "form", "versions"), LAID_OUT)
def test_a_worker_that_is_told_the_format_lays_out_the_same(
    tmp_path: Path, files: Files, form: str, versions: dict[str, str]
) -> None:
    write(tmp_path, files)
    assert lay_out(tmp_path, form, "m") == lay_out(tmp_path, "auto", "m")


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("m.onnx", "", "onnx"),
        ("M.ONNX", "", "onnx"),
        ("m.keras", "", "tensorflow"),
        ("m.json", '{"learner":{"attributes":{}', "xgboost"),
        ("m.txt", "tree\nversion=v4\n", "lightgbm"),
        ("model.py", "", "python"),
    ],
)
def test_a_single_file_is_told_by_ending_or_content(
    tmp_path: Path, name: str, content: str, form: str
) -> None:
    write(tmp_path, {name: content})
    layout = lay_out(tmp_path / name, "auto", "m")
    assert told(layout, tmp_path) == (form, {"": name})


def test_a_file_of_a_stated_format_may_have_any_name(tmp_path: Path) -> None:
    write(tmp_path, {"blob": ""})
    assert lay_out(tmp_path / "blob", "xgboost", "m").format == "xgboost"


@pytest.mark.parametrize(
    ("alias", "form"),
    [("keras", "tensorflow"), ("litert", "tflite"), ("torchscript", "pytorch"), ("onnx", "onnx")],
)
def test_other_names_of_a_format_are_understood(tmp_path: Path, alias: str, form: str) -> None:
    assert lay_out(tmp_path, alias, "m").format == form


def test_a_stated_format_needs_no_detection(tmp_path: Path) -> None:
    write(tmp_path, {"model.onnx": "", "preprocess.skops": ""})
    assert lay_out(tmp_path, "onnx", "m").format == "onnx"


def test_another_formats_file_beside_the_versions_is_no_model(tmp_path: Path) -> None:
    write(tmp_path, {"preprocess.pkl": "", "1/model.onnx": ""})
    assert told(lay_out(tmp_path, "onnx", "m"), tmp_path) == ("onnx", {"1": "1"})


def test_what_the_model_says_reaches_every_version(tmp_path: Path) -> None:
    write(tmp_path, {"config.pbtxt": "max_batch_size: 8", "1/a.onnx": "", "2/a.onnx": ""})
    layout = lay_out(tmp_path, "auto", "m")
    assert layout.options.max_batch_size == 8
    assert [version.options for version in layout.versions] == [None, None]


def test_a_folder_that_the_config_names_is_the_versions_path_and_named_no_more(
    tmp_path: Path,
) -> None:
    write(tmp_path, {"config.pbtxt": ONNX + 'default_model_filename: "net.onnx"'})
    write(tmp_path, {"1/net.onnx/model.onnx": ""})
    layout = lay_out(tmp_path, "auto", "m")
    assert told(layout, tmp_path) == ("onnx", {"1": "1/net.onnx"})
    assert layout.options.file == ""


def test_a_version_has_what_its_own_settings_say(tmp_path: Path) -> None:
    write(tmp_path, {"1/model-settings.json": '{"max_batch_size": 5}', "1/m.skops": ""})
    write(tmp_path, {"2/model-settings.json": '{"max_batch_size": 9}', "2/m.skops": ""})
    found = [one.options.max_batch_size for one in lay_out(tmp_path, "auto", "m").versions
             if one.options]  # fmt: skip
    assert found == [9, 5]


REFUSED = [
    pytest.param({"notes.md": ""}, "auto", "expected a model file", id="no model"),
    pytest.param({}, "auto", "found none", id="an empty folder"),
    pytest.param({"1/notes.md": ""}, "auto", "version 1: expected a model", id="an empty version"),
    pytest.param(
        {"a.onnx": "", "b.skops": ""}, "auto", "a.onnx (onnx), b.skops (sklearn)", id="two formats"
    ),
    pytest.param({"a.onnx": "", "b.skops": ""}, "auto", "modelFormat", id="how to say the format"),
    pytest.param({"a.pt": "", "b.pt": ""}, "auto", "named model.*", id="two of one format"),
    pytest.param({"model.bst": "?"}, "auto", "xgboost or lightgbm", id="unclear first bytes"),
    pytest.param(
        {"1/m.onnx": "", "2/m.pt": ""}, "auto",
        "same format in all versions; found pytorch (version 2), onnx (version 1)",
        id="versions of two formats",
    ),
    pytest.param(
        {"1/m.onnx": "", "01/m.onnx": ""}, "auto", "'01' and '1' are both version 1",
        id="one version twice",
    ),
    pytest.param(
        {"net/1/m.onnx": "", "README.md": "", "LICENSE": ""}, "auto",
        "around the model folder net, which is not looked into; let storageUri end in 'net'",
        id="a folder around the model folder",
    ),
    pytest.param(
        {"a/config.pbtxt": "", "b/model-settings.json": "{}"}, "onnx",
        "model folder a, b", id="a whole repository",
    ),
    pytest.param(
        {"config.pbtxt": 'platform: "tensorflow_savedmodel"', "1/model.onnx": ""}, "onnx",
        "the resource says that the model is onnx, and its config.pbtxt says tensorflow",
        id="the resource contradicts config.pbtxt",
    ),
    pytest.param(
        {"model-settings.json": "{" + SKLEARN + "}", "m.bst": ""}, "xgboost",
        "its model-settings.json says sklearn", id="the resource contradicts the settings",
    ),
    pytest.param(
        {"config.pbtxt": ONNX, "model-settings.json": "{}"}, "auto",
        "both config.pbtxt and model-settings.json", id="two descriptions",
    ),
    pytest.param(
        {"config.pbtxt": "version_policy { specific { versions: [1, 7] } }", "1/a.onnx": ""},
        "auto", "there is no folder for version 7; the versions are 1", id="a version too many",
    ),
    pytest.param(
        {"config.pbtxt": 'default_model_filename: "x"', "1/a.onnx": ""}, "auto",
        "config.pbtxt: default_model_filename: there is no 'x' in version 1", id="no such file",
    ),
    pytest.param(
        {"model-settings.json": '{"parameters": {"uri": "x"}}', "a.skops": ""}, "auto",
        "model-settings.json: parameters.uri: there is no 'x' in the model's folder",
        id="no such place",
    ),
    pytest.param(
        {"1/model-settings.json": '{"parameters": {"version": "2"}}', "1/m.skops": "",
         "2/m.skops": ""},
        "auto", "two versions are named '2'", id="two versions of a name",
    ),
    pytest.param(
        {"config.pbtxt": " " * (DESCRIPTION_MAX_BYTES + 1)}, "auto",
        "config.pbtxt: larger than 1 MiB", id="a description without end",
    ),
    pytest.param(
        {f"{number}/a.onnx": "" for number in range(VERSIONS_MAX + 1)}, "auto",
        "at most 100 versions", id="too many versions",
    ),
    pytest.param(
        {f"{number}.json": "{}" for number in range(101)}, "auto",
        "not the folder of one model", id="a heap of files",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("files", "model_type", "said"), REFUSED)
def test_an_unclear_artifact_is_refused_with_the_reason(
    tmp_path: Path, files: Files, model_type: str, said: str
) -> None:
    assert said in refused(write(tmp_path, files), model_type)


def test_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="there is no file or folder at 'gone'"):
        lay_out(tmp_path / "gone", "auto", "m")


def test_a_description_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_bytes(b"name: \xff")
    assert "config.pbtxt: not UTF-8 at byte 6" in refused(tmp_path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path, {"m.skops": "", "model-settings.json": "\ufeff{}"})
    assert lay_out(tmp_path, "auto", "m").format == "sklearn"


@pytest.mark.parametrize(
    ("files", "link"),
    [
        ({"model-settings.json": '{"parameters": {"uri": "link.joblib"}}'}, "link.joblib"),
        ({"config.pbtxt": 'default_model_filename: "link.joblib"', "1/a": ""}, "1/link.joblib"),
    ],
    ids=["settings", "config"],
)
def test_a_link_out_of_the_artifact_is_refused(tmp_path: Path, files: Files, link: str) -> None:
    (tmp_path / "secret.joblib").write_text("")
    artifact = write(tmp_path / "artifact", files)
    (artifact / link).symlink_to(tmp_path / "secret.joblib")
    assert "leads out of the model's artifact" in refused(artifact)


def test_a_link_inside_the_artifact_is_followed(tmp_path: Path) -> None:
    write(
        tmp_path, {"..data/fit.joblib": "", "model-settings.json": '{"parameters": {"uri": "m"}}'}
    )
    (tmp_path / "m").symlink_to("..data/fit.joblib")
    assert told(lay_out(tmp_path, "sklearn", "m"), tmp_path) == ("sklearn", {"": "m"})


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("m.json", "xgboost"), ("m.ubj", "xgboost"), ("m.bst", "xgboost")),
        *(("m.txt", "lightgbm"), ("m.bst", "lightgbm")),
    ],
)
def test_what_the_frameworks_write_is_told(tmp_path: Path, name: str, form: str) -> None:
    features, labels = np.arange(40.0).reshape(20, 2), np.arange(20.0) % 2
    if form == "xgboost":
        import xgboost

        booster = xgboost.train({"nthread": 1}, xgboost.DMatrix(features, labels), 1)
    else:
        import lightgbm

        data = lightgbm.Dataset(features, labels, params={"verbose": -1, "min_data_in_leaf": 1})
        booster = lightgbm.train({"verbose": -1, "num_threads": 1}, data, 1)
    # xgboost writes a .bst as UBJSON, but warns of it.
    written = tmp_path / name.replace(".bst", ".ubj" if form == "xgboost" else ".bst")
    booster.save_model(str(written))
    written.rename(tmp_path / name)
    assert lay_out(tmp_path / name, "auto", "m").format == form
    assert lay_out(tmp_path, "auto", "m").format == form


def test_all_versions_of_a_triton_folder_are_loaded_and_the_highest_is_the_latest(
    tmp_path: Path,
) -> None:
    for number in (2, 10):
        matmul(tmp_path / str(number) / "net.onnx", seed=number)
    write(tmp_path, {"config.pbtxt": ONNX + 'default_model_filename: "net.onnx"'})
    model = RuntimeRegistry().runtime_for("triton").load(ModelSpec("m", "triton", tmp_path))
    assert isinstance(model, VersionedModel)
    try:
        assert list(model.versions) == ["10", "2"]
        assert model.latest is model.versions["10"]
        x = {"x": np.ones((1, 4), np.float32)}
        answers = [one.infer(x, (), {})[0].data for one in model.versions.values()]
        assert not np.allclose(*answers)
    finally:
        model.unload()


class Elsewhere:
    """What a pod has beside the formats that run in it."""

    model_types = ()

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        raise AssertionError("nothing here runs elsewhere")

    load = predict_size_bytes


def test_what_a_model_says_in_vain_is_told_once_by_the_pod(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for version in ("1", "2"):
        matmul(tmp_path / version / "model.onnx")
    config = 'output { name: "y" data_type: TYPE_FP32 dims: [-1, 2] label_filename: "l.txt" }'
    (tmp_path / "config.pbtxt").write_text(config)
    spec = ModelSpec("named", "onnx", tmp_path)
    pod = RuntimeRegistry(isolated=Elsewhere()).runtime_for("onnx")
    pod.predict_size_bytes(spec)
    pod.load(spec).unload()
    RuntimeRegistry().runtime_for("onnx").load(spec).unload()  # as in a worker
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("model 'named': config.pbtxt: output[0].label_filename has no effect")
