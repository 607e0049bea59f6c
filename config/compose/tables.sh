#!/bin/sh
# Counts the rows of every table of the stack, through the catalog, as any reader would.
set -eu
pip install --quiet --root-user-action=ignore 'pyiceberg[pyarrow,s3fs]==0.12.0'
exec python - <<'PYTHON'
from pyiceberg.catalog import load_catalog

catalog = load_catalog("stack", type="rest", uri="http://catalog:8181", **{"s3.endpoint": "http://s3:7070"})
for namespace in catalog.list_namespaces():
    for table in catalog.list_tables(namespace):
        print(f"{'.'.join(table):32} {catalog.load_table(table).scan().count():>10} rows")
PYTHON
