"""The sets that have a name here, and what the literature reports on them under the same protocol."""

from dataclasses import dataclass
from pathlib import Path

from warehouse.home import data_root


@dataclass(frozen=True)
class Figure:
    """HR@10 and NDCG@10 on the test items."""

    model: str
    hr: float
    ndcg: float


@dataclass(frozen=True)
class PublishedSet:
    """path: below the data root. note: what a reader must know before comparing."""

    path: str
    note: str
    figures: tuple[Figure, ...]

    def file(self) -> Path:
        return data_root() / self.path


SETS = {
    "beauty": PublishedSet(
        "sequences/beauty.txt.gz",
        "Amazon Beauty as S3-Rec cut it",
        (
            Figure("SASRec", 0.0605, 0.0318),
            Figure("ActionPiece", 0.0775, 0.0424),
            Figure("DuoRec", 0.0845, 0.0443),
            Figure("eSASRec", 0.0928, 0.0523),
        ),
    ),
    "lastfm": PublishedSet("sequences/lastfm.txt.gz", "LastFM as S3-Rec cut it", (Figure("S3-Rec", 0.0743, 0.0427),)),
    "ml-1m": PublishedSet(
        "ml-1m/ml-1m.txt.gz",
        "the file that SASRec, BERT4Rec and gSASRec publish",
        (
            Figure("SASRec", 0.2392, 0.1259),
            Figure("BERT4Rec", 0.2843, 0.1537),
            Figure("gSASRec", 0.3003, 0.1726),
            Figure("SASRec, full cross-entropy", 0.3152, 0.1821),
            Figure("HSTU-large, other preprocessing", 0.3294, 0.1893),
        ),
    ),
    "ml-100k": PublishedSet("ml-100k", "ratings in the order of their times; equal times in the order of the file", ()),
}
