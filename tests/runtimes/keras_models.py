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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
