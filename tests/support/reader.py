"""Reads what Floe has written, with other people's readers: PyIceberg opens the catalog, DuckDB reads the tables.

One JSON request a line on stdin, one JSON answer a line on stdout. Stateless: every request names its catalog.
"""

import importlib.util
import json
import re
import sys
import traceback
from pathlib import Path

import duckdb
import pyarrow as pa
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import CommitFailedException, ValidationException
from pyiceberg.types import StringType

CATALOG = "floe"


def connect():
    connection = duckdb.connect()
    for name in ("httpfs", "avro", "iceberg"):
        package = Path(importlib.util.find_spec(f"duckdb_extension_{name}").origin).parent
        extension = package / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        connection.execute(f"load '{extension}'")
    connection.execute("set timezone = 'UTC'")
    connection.execute("set threads = 2")
    return connection


def catalog(request, create=False):
    properties = {"uri": f"sqlite:///{request['catalog']}", "init_catalog_tables": str(create).lower()}
    if "warehouse" in request:
        properties["warehouse"] = f"file://{request['warehouse']}"
    return SqlCatalog(CATALOG, **properties)


def query(connection, request):
    """`{namespace.table}` in the SQL stands for that table's current snapshot."""
    opened = catalog(request)

    def source(match):
        table = opened.load_table(match.group(1))
        if table.current_snapshot() is None:
            view = "empty_" + match.group(1).replace(".", "_")
            connection.register(view, table.scan().to_arrow())
            return view
        return f"iceberg_scan('{table.metadata_location}')"

    sql = re.sub(r"\{([\w.]+)\}", source, request["sql"])
    opened.engine.dispose()
    return [list(row) for row in connection.execute(sql).fetchall()]


def table(request):
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    opened.engine.dispose()
    return {
        "uuid": str(loaded.metadata.table_uuid),
        "metadata_location": loaded.metadata_location,
        "format_version": loaded.metadata.format_version,
        "properties": dict(loaded.properties),
        "columns": [[f.name, str(f.field_type), f.required] for f in loaded.schema().fields],
        "partition_by": [str(f.transform) + " " + f.name for f in loaded.spec().fields],
        "snapshots": [
            {"id": s.snapshot_id, "summary": dict(s.summary.additional_properties) if s.summary else {}}
            for s in loaded.snapshots()
        ],
        # PyIceberg's own scan, data files and all.
        "rows": loaded.scan().to_arrow().num_rows if request.get("scan") else None,
    }


def recreate(request):
    """Drops the table and creates one of the same name and schema: another table, as its UUID says."""
    opened = catalog(request)
    old = opened.load_table(request["table"])
    opened.drop_table(request["table"])
    opened.create_table(request["table"], schema=old.schema(), partition_spec=old.spec())
    opened.engine.dispose()


def write(request):
    """Creates a table and appends the rows: for the harness' test of itself."""
    opened = catalog(request, create=True)
    rows = pa.Table.from_pylist(request["rows"])
    opened.create_namespace_if_not_exists(request["table"].split(".")[0])
    written = opened.create_table_if_not_exists(request["table"], schema=rows.schema)
    if rows.num_rows:
        written.append(rows)
    opened.engine.dispose()


def add_column(request):
    """What another engine does to a table that Floe writes."""
    opened = catalog(request)
    update = opened.load_table(request["table"]).update_schema(allow_incompatible_changes=True)
    with update:
        update.add_column(request["column"], StringType(), required=request["required"])
    opened.engine.dispose()


def data_files(request):
    """Partition and size of every data file of the current snapshot."""
    opened = catalog(request)
    files = opened.load_table(request["table"]).inspect.data_files().to_pylist()
    opened.engine.dispose()
    return [[str(sorted(f["partition"].items())), f["file_size_in_bytes"]] for f in files]


def rows_at(request):
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    opened.engine.dispose()
    return loaded.scan(snapshot_id=request["snapshot"]).to_arrow().num_rows


def needed_files(request):
    """Every file that some snapshot of the table, or its log, names."""
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    opened.engine.dispose()
    found = {loaded.metadata_location} | {entry.metadata_file for entry in loaded.metadata.metadata_log}
    for snapshot in loaded.snapshots():
        found.add(snapshot.manifest_list)
        for manifest in snapshot.manifests(loaded.io):
            if manifest.manifest_path not in found:
                found.add(manifest.manifest_path)
                found.update(e.data_file.file_path for e in manifest.fetch_manifest_entry(loaded.io))
    return sorted(path.removeprefix("file://") for path in found)


def delete(request):
    """Rows go, as another engine deletes them: by rewriting files. It tries until nobody is faster."""
    opened = catalog(request)
    for _ in range(200):
        try:
            opened.load_table(request["table"]).delete(request["filter"])
            break
        except (CommitFailedException, ValidationException):
            continue
    else:
        raise RuntimeError("the other writer was always faster")
    opened.engine.dispose()


def neighbour(request):
    """What another engine does to a table: appends copies of rows under another topic, makes a branch and a tag, expires a snapshot."""
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    rows = loaded.scan(limit=request["rows"]).to_arrow().slice(0, request["rows"])
    position = rows.column_names.index("_kafka_topic")
    field = rows.schema.field("_kafka_topic")
    rows = rows.set_column(position, field, pa.array(["neighbour"] * rows.num_rows, field.type))
    loaded.append(rows)
    current = loaded.current_snapshot().snapshot_id
    loaded.manage_snapshots().create_branch(current, "audit").create_tag(current, "kept").commit()
    oldest = loaded.snapshots()[0].snapshot_id
    loaded.maintenance.expire_snapshots().by_id(oldest).commit()
    opened.engine.dispose()
    return [current, oldest]


def refs(request):
    opened = catalog(request)
    found = {name: ref.snapshot_id for name, ref in opened.load_table(request["table"]).refs().items()}
    opened.engine.dispose()
    return found


def answer(connection, request):
    match request["op"]:
        case "query":
            return query(connection, request)
        case "table":
            return table(request)
        case "recreate":
            return recreate(request)
        case "drop":
            return catalog(request).drop_table(request["table"])
        case "write":
            return write(request)
        case "data_files":
            return data_files(request)
        case "rows_at":
            return rows_at(request)
        case "needed_files":
            return needed_files(request)
        case "delete":
            return delete(request)
        case "neighbour":
            return neighbour(request)
        case "refs":
            return refs(request)
        case "add_column":
            return add_column(request)
        case other:
            raise ValueError(f"unknown request {other}")


def main():
    connection = connect()
    for line in sys.stdin:
        try:
            reply = {"ok": answer(connection, json.loads(line))}
        except Exception:
            reply = {"error": traceback.format_exc()}
        sys.stdout.write(json.dumps(reply, default=str) + "\n")
        sys.stdout.flush()


main()
