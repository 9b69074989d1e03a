"""Checks that a trace opens in pandas, pyarrow and DuckDB with the documented columns. Makes no golden file.

    python3 -m venv .cache/venv/trace
    .cache/venv/trace/bin/pip install pandas==3.1.1 pyarrow==26.0.1 duckdb==2.0.0
    cadre trace --data FILE -o out.parquet && cadre trace show out.parquet -o json > out.json
    .cache/venv/trace/bin/python golden/make/trace_parquet.py out.parquet [out.json]

Checked: the types of every column in each library, the file metadata, that no cell is null, that each row has as
many weights as experts, that ids are in range, and that pandas and DuckDB count the same load per layer and expert;
with the JSON of `trace show`, that Cadre counts it too.
"""

import json
import sys

import duckdb
import pandas as pd
import pyarrow.parquet as pq

ARROW = {
    "seq": "uint32",
    "pos": "uint32",
    "token": "uint32",
    "domain": "dictionary<values=string, indices=int32, ordered=0>",
    "layer": "uint16",
    "experts": "list<item: uint16 not null>",
    "weights": "list<item: float not null>",
    "logits": "list<item: float not null>",
    "norms": "list<item: float not null>",
}
DUCKDB = {
    "seq": "UINTEGER",
    "pos": "UINTEGER",
    "token": "UINTEGER",
    "domain": "VARCHAR",
    "layer": "USMALLINT",
    "experts": "USMALLINT[]",
    "weights": "FLOAT[]",
    "logits": "FLOAT[]",
    "norms": "FLOAT[]",
}
OPTIONAL = {"logits", "norms"}
KEYS = ["trace_version", "version", "digest", "architecture", "n_layers", "n_experts", "top_k"]


def same(what, found, expected):
    if found != expected:
        sys.exit(f"{what}: found {found}, expected {expected}")


def check_columns(what, found, expected):
    required = [name for name in expected if name in found or name not in OPTIONAL]
    same(f"{what} columns", list(found), required)
    for name, kind in found.items():
        same(f"{what} type of {name}", kind, expected[name])


def main(path, report=None):
    schema = pq.read_schema(path)
    check_columns("pyarrow", {field.name: str(field.type) for field in schema}, ARROW)
    pairs = duckdb.sql(f"SELECT key, value FROM parquet_kv_metadata('{path}')").fetchall()
    for library, found in [("pyarrow", schema.metadata or {}), ("DuckDB", dict(pairs))]:
        metadata = {key: found.get(f"cadre.{key}".encode()) for key in KEYS}
        same(f"metadata keys that {library} misses", [key for key, value in metadata.items() if value is None], [])
    n_experts = int(metadata["n_experts"])

    described = duckdb.sql(f"DESCRIBE SELECT * FROM '{path}'").fetchall()
    check_columns("DuckDB", {row[0]: row[1] for row in described}, DUCKDB)

    frame = pd.read_parquet(path)
    same("pandas type of domain", str(frame["domain"].dtype), "category")
    same("pandas type of layer", str(frame["layer"].dtype), "uint16")
    same("null cells", int(frame.isna().sum().sum()), 0)
    same("rows with uneven lists", int((frame["experts"].map(len) != frame["weights"].map(len)).sum()), 0)

    picks = frame[["layer", "experts"]].explode("experts").dropna()
    same("experts out of range", int((picks["experts"] >= n_experts).sum()), 0)
    by_pandas = {(int(layer), int(expert)): int(n) for (layer, expert), n in picks.value_counts().items()}
    rows = duckdb.sql(
        f"SELECT layer, expert, count(*) FROM (SELECT layer, unnest(experts) AS expert FROM '{path}') GROUP BY ALL"
    ).fetchall()
    same("load by DuckDB equals load by pandas", {(layer, expert): n for layer, expert, n in rows} == by_pandas, True)
    if report is not None:
        with open(report, encoding="utf-8") as file:
            layers = json.load(file)["layers"]
        by_cadre = {(layer["layer"], e): n for layer in layers for e, n in enumerate(layer["load"]) if n > 0}
        same("load by Cadre equals load by pandas", by_cadre == by_pandas, True)
    print(f"ok: {len(frame)} rows, {len(picks)} picks; pandas {pd.__version__}, DuckDB {duckdb.__version__}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
