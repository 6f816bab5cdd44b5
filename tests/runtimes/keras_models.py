"""Writes the TensorFlow and LiteRT models of the tests, with their own answers, below a folder.

A process of its own: TensorFlow and what else the tests import need not meet.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_iris


def main(folder: Path) -> None:
    tf.keras.utils.set_random_seed(0)
    x = load_iris().data.astype(np.float32)
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((4,), name="features"),
            tf.keras.layers.Dense(8, activation="relu"),
            tf.keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, load_iris().target, epochs=3, verbose=0)
    np.save(folder / "expected.npy", model(x).numpy())
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model.export(str(folder / "saved"), verbose=False)
    lite = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    (folder / "model.tflite").write_bytes(lite)
    code = tf.keras.Sequential(
        [tf.keras.layers.Input((4,)), tf.keras.layers.Lambda(lambda t: t * 2)]
    )
    code.save(folder / "lambda.keras")

    class Texts(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def __call__(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"upper": tf.strings.upper(text), "length": tf.strings.length(text)}

    tf.saved_model.save(Texts(), str(folder / "texts"))
    code.save(folder / "lambda.h5")
    with_dicts(folder)
    quantised(folder, model, x)
    with_signatures(folder)


def with_dicts(folder: Path) -> None:
    a = tf.keras.layers.Input((2,), name="a")
    b = tf.keras.layers.Input((2,), name="b")
    tf.keras.Model({"b": b, "a": a}, {"sum": a + b, "twice": a * 2.0}).save(folder / "dicts.keras")
    subclassed = type("Subclassed", (tf.keras.Sequential,), {})
    subclassed([tf.keras.layers.Dense(2)]).save(folder / "unknown.keras")


def quantised(folder: Path, model: tf.keras.Model, x: np.ndarray) -> None:
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([row[None]] for row in x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    (folder / "int8.tflite").write_bytes(converter.convert())


def with_signatures(folder: Path) -> None:
    class Several(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
        def twice(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": x * 2.0}

        @tf.function(
            input_signature=[tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int32)]
        )
        def pick(self, words: tf.Tensor, places: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"picked": tf.gather(words, places)}

        @tf.function(input_signature=[tf.TensorSpec([2], tf.bfloat16)])
        def half(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": x / 2}

    several = Several()
    path = str(folder / "several")
    kept = ("twice", "pick", "half")
    tf.saved_model.save(several, path, {name: getattr(several, name) for name in kept})
    converter = tf.lite.TFLiteConverter.from_saved_model(path, signature_keys=["twice", "pick"])
    (folder / "several.tflite").write_bytes(converter.convert())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
