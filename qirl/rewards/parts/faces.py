"""Are the people of a source the same in its edit? Cosine of face embeddings, matched one to one.

    source no face            the component does not apply
    a source face unmatched   0 (the output has fewer faces)
    matched                   (cosine - low) / (high - low), clipped to [0, 1]
    further output faces      each takes `surplus` off

Faces less wide than `smallest` of the image's shorter side are none. Matches maximise the sum of cosines (Hungarian method);
the score is the mean over the source's faces, all alike or by their width. Several sources: the faces of all of them.
Weights come from files that the user gives: YuNet and SFace (OpenCV zoo, MIT and Apache-2.0) are the default.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from qirl.config_parts import FaceOptions
from qirl.errors import UserError
from qirl.rewards.protocol import Sample, Scores


@dataclass(frozen=True)
class Face:
    """width in pixels; embedding: a unit vector float32 [D]."""

    width: float
    embedding: np.ndarray


class FaceReader(Protocol):
    """Detector and embedder behind one interface."""

    def faces(self, image: np.ndarray) -> list[Face]:
        """The faces of an image, uint8 [H, W, 3] RGB."""


class FaceIdentity:
    """Applies to edits whose sources show a face."""

    def __init__(self, name: str, options: FaceOptions, reader: FaceReader | None = None):
        self.components, self.options = (name,), options
        self.reader = reader or {"opencv": OpenCvFaces, "insightface": InsightFaces}[options.backend](options)

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        rows: list[Scores] = []
        for sample in samples:
            known = [face for source in sample.sources for face in self.seen(source)]
            rows.append({self.components[0]: self.score(known, self.seen(sample.image))} if known else {})
        return rows

    def seen(self, image: np.ndarray) -> list[Face]:
        """The faces that are large enough."""
        least = self.options.smallest * min(image.shape[:2])
        return [face for face in self.reader.faces(image) if face.width >= least]

    def score(self, known: Sequence[Face], found: Sequence[Face]) -> float:
        from scipy.optimize import linear_sum_assignment

        weights = np.array([face.width if self.options.weight == "size" else 1.0 for face in known])
        kept = np.zeros(len(known))
        if found:
            cosines = np.stack([f.embedding for f in known]) @ np.stack([f.embedding for f in found]).T
            for i, j in zip(*linear_sum_assignment(-cosines), strict=True):
                kept[i] = self.options.score(float(cosines[i, j]))
        surplus = self.options.surplus * max(0, len(found) - len(known))
        return max(0.0, float(np.average(kept, weights=weights)) - surplus)


def fit(same: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(low, high) of a calibration set: the median cosine of pairs of different people, and of pairs of one person.

    Raises UserError where the two do not come apart.
    """
    low, high = float(np.median(other)), float(np.median(same))
    if high <= low:
        raise UserError(
            f"pairs of one person have a median cosine of {high:.3f}, pairs of two people {low:.3f}; check the labels"
        )
    return low, high


def _file(path: str | None, what: str) -> str:
    if not path or not Path(path).exists():
        raise UserError(f"the {what} {path} does not exist; download it and give its path")
    return path


class OpenCvFaces:
    """YuNet finds faces and five landmarks, SFace embeds the aligned crop. One call at a time: both keep state."""

    def __init__(self, options: FaceOptions):
        try:
            import cv2
        except ImportError as error:
            raise UserError(f"face_identity needs OpenCV ({error}): pip install opencv-python-headless") from None
        detector, embedder = _file(options.detector, "face detector"), _file(options.embedder, "face embedder")
        try:
            self.detector = cv2.FaceDetectorYN.create(detector, "", (320, 320), 0.7)
            self.embedder = cv2.FaceRecognizerSF.create(embedder, "")
        except cv2.error as error:
            raise UserError(f"OpenCV cannot load {detector} or {embedder}: {error}") from None
        self._one = threading.Lock()

    def faces(self, image: np.ndarray) -> list[Face]:
        picture = np.ascontiguousarray(image[..., ::-1])
        with self._one:
            self.detector.setInputSize((image.shape[1], image.shape[0]))
            _, boxes = self.detector.detect(picture)
            found = []
            for box in boxes if boxes is not None else ():
                vector = self.embedder.feature(self.embedder.alignCrop(picture, box))[0].astype(np.float32)
                found.append(Face(float(box[2]), vector / max(1e-9, float(np.linalg.norm(vector)))))
        return found


class InsightFaces:
    """A model pack of insightface (AuraFace is one). The packs that insightface distributes are for research only."""

    def __init__(self, options: FaceOptions):
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise UserError(
                f"backend insightface needs its package ({error}): pip install insightface onnxruntime"
            ) from None
        pack = Path(_file(options.pack, "model pack"))
        warnings.warn(
            f"{pack}: check the licence of this model pack; insightface's own are for non-commercial research, AuraFace is "
            "Apache-2.0",
            stacklevel=2,
        )
        self.app = FaceAnalysis(name=pack.name, root=str(pack.parent.parent))
        self.app.prepare(ctx_id=0, det_size=(640, 640))
        self._one = threading.Lock()

    def faces(self, image: np.ndarray) -> list[Face]:
        with self._one:
            found = self.app.get(np.ascontiguousarray(image[..., ::-1]))
        return [Face(float(f.bbox[2] - f.bbox[0]), np.asarray(f.normed_embedding, np.float32)) for f in found]
