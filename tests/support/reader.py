"""Reads what Floe has written, with other people's readers: PyIceberg opens the catalog, DuckDB reads the tables.

One JSON request a line on stdin, one JSON answer a line on stdout. Stateless: every request names its catalog.
"""

import importlib.util
import json
import random
import re
import statistics
import sys
import time
import traceback
from pathlib import Path

import duckdb
import pyarrow as pa
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import CommitFailedException, ValidationException
from pyiceberg.manifest import clear_manifest_cache
from pyiceberg.types import StringType

import agree

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
    if request["catalog"].startswith("http"):
        return RestCatalog("rest", uri=request["catalog"], **request.get("properties", {}))
    properties = {"uri": f"sqlite:///{request['catalog']}", "init_catalog_tables": str(create).lower()}
    properties |= request.get("properties", {})
    if "warehouse" in request:
        properties["warehouse"] = f"file://{request['warehouse']}"
    return SqlCatalog(CATALOG, **properties)


def close(opened):
    if isinstance(opened, SqlCatalog):
        opened.engine.dispose()


def query(connection, request):
    """`{namespace.table}` in the SQL stands for that table's current snapshot."""
    store = request.get("properties", {})
    if "s3.endpoint" in store:
        connection.execute(
            f"create or replace secret (type s3, key_id '{store['s3.access-key-id']}', "
            f"secret '{store['s3.secret-access-key']}', region '{store['s3.region']}', "
            f"endpoint '{store['s3.endpoint'].split('//')[1]}', url_style 'path', use_ssl false)"
        )

    def source(match):
        table = opened.load_table(match.group(1))
        locations.append(table.metadata_location)
        if table.current_snapshot() is None:
            view = "empty_" + match.group(1).replace(".", "_")
            connection.register(view, table.scan().to_arrow())
            return view
        return f"iceberg_scan('{table.metadata_location}')"

    before = None
    while True:
        opened, locations = catalog(request), []
        sql = re.sub(r"\{([\w.]+)\}", source, request["sql"])
        close(opened)
        try:
            return [list(row) for row in connection.execute(sql).fetchall()]
        except duckdb.IOException:
            # Metadata that is twenty commits old is gone: a reader that was held up for so long looks again.
            if locations == before:
                raise
            before = locations


def table(request):
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    close(opened)
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


def attached(connection, request):
    """DuckDB asks the REST catalog by itself; `r.namespace.table` in the SQL."""
    options = f"type iceberg, endpoint '{request['catalog']}', authorization_type 'none'"
    connection.execute(f"attach '' as r ({options})")
    try:
        return [list(row) for row in connection.execute(request["sql"]).fetchall()]
    finally:
        connection.execute("detach r")


def touch(request):
    """Another writer's commit, which leaves the rows as they are."""
    loaded = catalog(request).load_table(request["table"])
    loaded.append(loaded.schema().as_arrow().empty_table())


def recreate(request):
    """Drops the table and creates one of the same name and schema: another table, as its UUID says."""
    opened = catalog(request)
    old = opened.load_table(request["table"])
    opened.drop_table(request["table"])
    opened.create_table(request["table"], schema=old.schema(), partition_spec=old.spec())
    close(opened)


def write(request):
    """Creates a table and appends the rows: for the harness' test of itself."""
    opened = catalog(request, create=True)
    rows = pa.Table.from_pylist(request["rows"])
    opened.create_namespace_if_not_exists(request["table"].split(".")[0])
    written = opened.create_table_if_not_exists(request["table"], schema=rows.schema)
    if rows.num_rows:
        written.append(rows)
    close(opened)


def add_column(request):
    """What another engine does to a table that Floe writes."""
    opened = catalog(request)
    update = opened.load_table(request["table"]).update_schema(allow_incompatible_changes=True)
    with update:
        update.add_column(request["column"], StringType(), required=request["required"])
    close(opened)


def data_files(request):
    """Partition and size of every data file of the current snapshot."""
    opened = catalog(request)
    files = opened.load_table(request["table"]).inspect.data_files().to_pylist()
    close(opened)
    return [[str(sorted(f["partition"].items())), f["file_size_in_bytes"]] for f in files]


def rows_at(request):
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    close(opened)
    return loaded.scan(snapshot_id=request["snapshot"]).to_arrow().num_rows


def loaded(request):
    opened = catalog(request)
    found = opened.load_table(request["table"])
    close(opened)
    return found


def plan(request):
    opened = catalog(request)
    times = []
    for _ in range(7):
        # From the catalog on, as a new process plans.
        clear_manifest_cache()
        started = time.perf_counter()
        files = sum(1 for _ in opened.load_table(request["table"]).scan().plan_files())
        times.append(time.perf_counter() - started)
    close(opened)
    return [statistics.median(times), files]


def needed_files(request):
    """Every file that some snapshot of the table, or its log, names."""
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    close(opened)
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
    close(opened)


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
    close(opened)
    return [current, oldest]


def refs(request):
    opened = catalog(request)
    found = {name: ref.snapshot_id for name, ref in opened.load_table(request["table"]).refs().items()}
    close(opened)
    return found


def append_copies(request):
    """Rows with a provenance of their own, one a commit."""
    opened = catalog(request)
    loaded = opened.load_table(request["table"])
    row = loaded.scan(limit=1).to_arrow().to_pylist()[0]
    for number in range(request["times"]):
        row |= {"_kafka_topic": request["topic"], "_kafka_offset": number}
        rows = pa.Table.from_pylist([row], schema=loaded.schema().as_arrow())
        for attempt in range(500):
            try:
                opened.load_table(request["table"]).append(rows)
                break
            except CommitFailedException:
                time.sleep(random.random() * min(0.02 * 2**attempt, 1))
        else:
            raise RuntimeError("the other writers were always faster")
    close(opened)


def answer(connection, request):
    match request["op"]:
        case "query":
            return query(connection, request)
        case "table":
            return table(request)
        case "recreate":
            return recreate(request)
        case "attached":
            return attached(connection, request)
        case "touch":
            return touch(request)
        case "append_copies":
            return append_copies(request)
        case "drop":
            return catalog(request).drop_table(request["table"])
        case "write":
            return write(request)
        case "data_files":
            return data_files(request)
        case "rows_at":
            return rows_at(request)
        case "plan":
            return plan(request)
        case "agree":
            return agree.agree(connection, loaded(request), request)
        case "filters":
            return agree.filters(connection, loaded(request), request)
        case "statistics":
            return agree.statistics(loaded(request))
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
