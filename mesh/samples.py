"""Sample models: a few hundred small ones that really learnt something, made in seconds.

``python -m mesh.samples DIR --count 300`` writes one folder for each model: ``model.onnx``
(a hidden layer of random ReLU features and a ridge regression on them, solved in closed form, so
that training one takes a tenth of a second) and three ``model.skops`` pipelines of scikit-learn.
The data are those that scikit-learn bundles (digits, iris, wine, breast cancer); the seed of a
model is its number, so the same command makes the same models everywhere. Folders that are there
already are kept. Needs ``pip install 'modelmesh-py[samples,sklearn]'``.

Owns the samples' names and examples; must not know how they are served. A folder appears complete
or not at all (written beside and renamed).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MANIFEST: Final = ".samples.json"
EXAMPLES: Final = ".examples.json"
# Raise it when the models change: folders of another version are made anew.
VERSION: Final = 1

INPUT: Final = "input"
PROBABILITIES: Final = "probabilities"
LABEL: Final = "label"

COUNT_DEFAULT: Final = 300
COUNT_MAX: Final = 9_999
HELD_OUT: Final = 0.2

# Of 30 ONNX models, how many are of each data set.
_MIX: Final = (("digits", 27), ("iris", 1), ("wine", 1), ("breast-cancer", 1))
_SKOPS: Final = ("iris", "digits", "breast-cancer")
_HIDDEN: Final = {"digits": (640, 768, 896, 1024), "iris": (64,), "wine": (96,)}
_HIDDEN_DEFAULT: Final = (128,)
# The regression answers about 0 and 1; this makes its softmax as sure as its accuracy is.
_SHARPNESS: Final = 8.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One model. ``accuracy`` is on the fifth of the data that it was not trained on."""

    name: str
    model_format: str  # onnx | sklearn
    data: str
    accuracy: float
    size_bytes: int
    version: int = VERSION


def sample_names(count: int) -> list[tuple[str, str, str, int]]:
    """(name, format, data set, seed) of the first ``count`` samples; always the same."""
    if not 1 <= count <= COUNT_MAX:
        raise ValueError(f"the count must be between 1 and {COUNT_MAX}, not {count}")
    names = [(f"{data}-skops", "sklearn", data, 1) for data in _SKOPS]
    # The first few are of every data set, so that a small count has them, too.
    cycle = [data for data, _ in _MIX]
    cycle += [data for data, share in _MIX for _ in range(share - 1)]
    made = dict.fromkeys(cycle, 0)
    for index in range(count):
        data = cycle[index % len(cycle)]
        made[data] += 1
        names.append((f"{data}-{made[data]:04d}", "onnx", data, made[data]))
    return names[:count]


def make_samples(
    directory: Path, count: int, progress: Callable[[int, int], None] | None = None
) -> list[Sample]:
    """Makes what is missing and returns all. ``progress(done, of)`` is called after each."""
    directory.mkdir(parents=True, exist_ok=True)
    known = _read_manifest(directory)
    samples: list[Sample] = []
    wanted = sample_names(count)
    for done, (name, model_format, data, seed) in enumerate(wanted, start=1):
        sample = known.get(name)
        file_name = _FILE_NAMES[model_format]
        if sample is None or not (directory / name / file_name).is_file():
            sample = _make(directory, name, model_format, data, seed)
        samples.append(sample)
        if progress is not None:
            progress(done, len(wanted))
    kept = {**known, **{sample.name: sample for sample in samples}}
    _write_json(directory / MANIFEST, [asdict(kept[name]) for name in sorted(kept)])
    _write_json(directory / EXAMPLES, examples())
    return samples


def examples() -> list[dict[str, Any]]:
    """Requests to paste, each with the path, the body and the answer that it gets."""
    setosa, virginica = [5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]
    flowers = [*setosa, *virginica]
    return [
        {
            "model": "iris-0001",
            "path": "/v2/models/iris-0001/infer",
            "request": {
                "inputs": [_json_tensor(INPUT, "FP32", [2, 4], flowers)],
                "outputs": [{"name": LABEL}],
            },
            "response": {
                "model_name": "iris-0001",
                "outputs": [_json_tensor(LABEL, "INT64", [2], [0, 2])],
            },
        },
        {
            "model": "iris-skops",
            "path": "/v2/models/iris-skops/infer",
            "request": {"inputs": [_json_tensor("predict", "FP64", [2, 4], flowers)]},
            "response": {
                "model_name": "iris-skops",
                "outputs": [_json_tensor("predict", "INT64", [2, 1], [0, 2])],
            },
        },
        {
            "model": "iris-skops",
            "path": "/v1/models/iris-skops:predict",
            "request": {"instances": [setosa, virginica]},
            "response": {"predictions": [0, 2]},
        },
    ]


def _json_tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


# ---- data and training ----


@dataclass(frozen=True, slots=True)
class Split:
    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


@cache
def data_set(data: str) -> tuple[Array, Array]:
    """Features and labels, as scikit-learn bundles them."""
    from sklearn import datasets

    loaders = {
        "digits": datasets.load_digits,
        "iris": datasets.load_iris,
        "wine": datasets.load_wine,
        "breast-cancer": datasets.load_breast_cancer,
    }
    features, labels = loaders[data](return_X_y=True)
    return features.astype(np.float64), labels.astype(np.int64)


def split_of(data: str, seed: int) -> Split:
    """A seed's own fifth is held out; what a model was tested on can be had again."""
    features, labels = data_set(data)
    order = np.random.default_rng([VERSION, seed]).permutation(len(labels))
    cut = round(len(labels) * (1 - HELD_OUT))
    train, test = order[:cut], order[cut:]
    return Split(features[train], labels[train], features[test], labels[test])


@dataclass(frozen=True, slots=True)
class Network:
    """softmax(relu(x W1 + b1) W2 + b2), float32."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array

    def labels(self, features: Array) -> Array:
        hidden = np.maximum(features.astype(np.float32) @ self.w1 + self.b1, 0)
        found: Array = np.argmax(hidden @ self.w2 + self.b2, axis=1)
        return found


def train_network(split: Split, hidden: int, seed: int) -> Network:
    """Random ReLU features of the standardised input, ridge regression to one-hot labels."""
    draw = np.random.default_rng([VERSION, seed, hidden])
    mean = split.train_x.mean(axis=0)
    scale = split.train_x.std(axis=0)
    scale[scale == 0] = 1.0
    width = split.train_x.shape[1]
    w1 = draw.standard_normal((width, hidden)) / np.sqrt(width)
    b1 = draw.standard_normal(hidden) * 0.5
    features = np.maximum((split.train_x - mean) / scale @ w1 + b1, 0)
    center = features.mean(axis=0)
    centered = features - center
    one_hot = np.eye(int(split.train_y.max()) + 1)[split.train_y]
    bias = one_hot.mean(axis=0)
    ridge = 1e-3 * len(features) * np.eye(hidden)
    w2 = np.linalg.solve(centered.T @ centered + ridge, centered.T @ (one_hot - bias))
    b2 = bias - center @ w2
    # The standardisation is folded in, so that the model takes the data as they are.
    return Network(
        (w1 / scale[:, None]).astype(np.float32),
        (b1 - (mean / scale) @ w1).astype(np.float32),
        (w2 * _SHARPNESS).astype(np.float32),
        (b2 * _SHARPNESS).astype(np.float32),
    )


def onnx_bytes(network: Network, name: str) -> bytes:
    """The network as an ONNX file: input -> probabilities, label."""
    from onnx import TensorProto, helper, numpy_helper

    classes = network.w2.shape[1]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", [INPUT, "w1", "b1"], ["pre"]),
            helper.make_node("Relu", ["pre"], ["hidden"]),
            helper.make_node("Gemm", ["hidden", "w2", "b2"], ["scores"]),
            helper.make_node("Softmax", ["scores"], [PROBABILITIES], axis=-1),
            helper.make_node("ArgMax", ["scores"], [LABEL], axis=-1, keepdims=0),
        ],
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", network.w1.shape[0]])],
        [
            helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["n", classes]),
            helper.make_tensor_value_info(LABEL, TensorProto.INT64, ["n"]),
        ],
        [
            numpy_helper.from_array(getattr(network, weight), weight)
            for weight in ("w1", "b1", "w2", "b2")
        ],
    )
    # Opset 17 and IR 8 are read by every onnxruntime since 1.13.
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="mesh"
    )
    content: bytes = model.SerializeToString()
    return content


# ---- files ----

_FILE_NAMES: Final = {"onnx": "model.onnx", "sklearn": "model.skops"}


def _make(directory: Path, name: str, model_format: str, data: str, seed: int) -> Sample:
    split = split_of(data, seed)
    content: bytes
    if model_format == "onnx":
        sizes = _HIDDEN.get(data, _HIDDEN_DEFAULT)
        network = train_network(split, sizes[seed % len(sizes)], seed)
        content, answers = onnx_bytes(network, name), network.labels(split.test_x)
    else:
        content, answers = _skops_pipeline(split, seed)
    accuracy = float((answers == split.test_y).mean())
    unfinished = directory / f".unfinished-{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    (unfinished / _FILE_NAMES[model_format]).write_bytes(content)
    shutil.rmtree(directory / name, ignore_errors=True)
    unfinished.rename(directory / name)
    return Sample(name, model_format, data, round(accuracy, 4), len(content))


def _skops_pipeline(split: Split, seed: int) -> tuple[bytes, Array]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from mesh.runtimes.sklearn import import_skops

    model = make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed)
    ).fit(split.train_x, split.train_y)
    answers: Array = model.predict(split.test_x)
    return bytes(import_skops().dumps(model)), answers


def _read_manifest(directory: Path) -> dict[str, Sample]:
    """What an earlier run made; a manifest that cannot be read is as good as none."""
    try:
        entries = json.loads((directory / MANIFEST).read_text())
        found = [Sample(**entry) for entry in entries]
    except (OSError, ValueError, TypeError):
        return {}
    return {sample.name: sample for sample in found if sample.version == VERSION}


def _write_json(path: Path, value: Any) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)


# ---- command ----


def _describe(samples: list[Sample], address: str) -> Iterator[str]:
    total_mb = sum(sample.size_bytes for sample in samples) / 1e6
    worst = min(samples, key=lambda sample: sample.accuracy)
    yield f"{len(samples)} models, {total_mb:.0f} MB; "
    yield f"the least accurate is {worst.name} with {worst.accuracy:.1%}\n"
    made = {sample.name for sample in samples}
    for example in examples():
        if example["model"] not in made:
            continue
        body = json.dumps(example["request"])
        yield f"\ncurl -s http://{address}{example['path']} -d '{body}'\n"
        yield f"{json.dumps(example['response'])}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mesh.samples", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the models' folders go")
    parser.add_argument("--count", type=int, default=COUNT_DEFAULT, help="how many models")
    parser.add_argument("--address", default="127.0.0.1:8008", help="for the printed requests")
    options = parser.parse_args(arguments)
    try:
        samples = make_samples(options.directory, options.count, _show_progress)
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        sys.stderr.write(f"{error}: pip install 'modelmesh-py[samples,sklearn]'\n")
        return 1
    sys.stdout.writelines(_describe(samples, options.address))
    return 0


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{of} models" + ("\n" if done == of else ""))


if __name__ == "__main__":
    sys.exit(main())
