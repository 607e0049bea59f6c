"""Three readers of one table: they have to agree with each other, with what was written, and when they filter."""

import datetime as dt
import math

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg import expressions as ex

EPOCH = dt.datetime(1970, 1, 1)


def canonical(value, kind):
    """Values that are the same have the same form, whichever library hands them over."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        pairs = [(v["key"], v["value"]) if isinstance(v, dict) else v for v in value]
        return sorted((canonical(k, kind.key_type), canonical(v, kind.item_type)) for k, v in pairs)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [canonical(v, kind.value_type) for v in value]
    if pa.types.is_struct(kind):
        return {f.name: canonical(value[f.name], f.type) for f in kind}
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dt.datetime):
        if value.tzinfo is not None:
            value = value.astimezone(dt.timezone.utc).replace(tzinfo=None)
        return (value - EPOCH) // dt.timedelta(microseconds=1)
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    return str(value) if not isinstance(value, (bool, int, str)) else value


def is_list_of_records(kind):
    return pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)


def forms(rows, kinds, key):
    columns = {f.name: [canonical(v, f.type) for v in rows.column(f.name).to_pylist()] for f in kinds}
    keys = list(zip(*(columns[name] for name in key.split(","))))
    return [{name: values[i] for name, values in columns.items()} for i in sorted(range(len(keys)), key=keys.__getitem__)]


def truth_of(request):
    if "truth" not in request:
        return None
    with pa.ipc.open_stream(request["truth"]) as stream:
        return stream.read_all()


def duck_source(table, snapshot):
    then = f", snapshot_from_id => {snapshot}" if snapshot else ""
    return f"iceberg_scan('{table.metadata_location}'{then})"


def agree(connection, table, request):
    """How many rows PyIceberg, DuckDB and Polars find, and who else has left files of its rows, all of them the same; as in the
    file of the truth, if there is one."""
    snapshot = request.get("snapshot")
    pyiceberg = table.scan(snapshot_id=snapshot).to_arrow()
    found = {
        "duckdb": connection.execute(f"select * from {duck_source(table, snapshot)}").to_arrow_table(),
        "polars": pl.scan_iceberg(table, snapshot_id=snapshot).collect().to_arrow(),
    }
    found |= {reader: pq.read_table(folder) for reader, folder in request.get("also", {}).items()}
    truth = truth_of(request)
    kinds = pyiceberg.schema if truth is None else truth.schema
    expected = forms(pyiceberg if truth is None else truth, kinds, request["key"])
    if truth is not None:
        found["pyiceberg"] = pyiceberg
    for reader, rows in found.items():
        rows = forms(rows, kinds, request["key"])
        if reader == "pyiceberg":
            # PyIceberg 0.12 loses the nulls of lists of records, in any table (it works around apache/arrow#38809).
            lists = [field.name for field in kinds if is_list_of_records(field.type)]
            expected = [row | {name: row[name] or [] for name in lists} for row in expected]
        if len(rows) != len(expected):
            raise AssertionError(f"{reader}: {len(rows)} rows, expected {len(expected)}")
        for theirs, ours in zip(rows, expected):
            if theirs != ours:
                different = {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}
                raise AssertionError(f"{reader}: row {[ours[name] for name in request['key'].split(',')]}: found and expected {different}")
    return len(expected)


def leaves(schema, path=()):
    for field in schema:
        here = (*path, field.name)
        if pa.types.is_struct(field.type):
            yield from leaves(field.type, here)
        elif not pa.types.is_nested(field.type):
            yield here, field.type


def leaf(rows, path):
    column = rows.column(path[0])
    for name in path[1:]:
        column = pc.struct_field(column, name)
    return column


def filters(connection, table, request):
    """By column: the fewest files that PyIceberg plans to read for one of its values. Every filter has to find all rows."""
    truth = truth_of(request)
    # A table of DuckDB's own: of Arrow tables, pyarrow does the filtering, for which NaN is not the largest number.
    connection.register("arrow_truth", truth)
    connection.execute("create or replace temp table truth as select * from arrow_truth")
    connection.unregister("arrow_truth")
    source = duck_source(table, None)
    count = lambda rows, where: connection.execute(f"select count(*) from {rows} where {where}").fetchone()[0]
    fewest = {}
    for path, kind in leaves(truth.schema):
        name, sql = ".".join(path), ".".join(f'"{part}"' for part in path)
        column = leaf(truth, path)
        wheres = [f"{sql} is null", f"{sql} is not null"]
        values = connection.execute(
            f"select distinct {sql}::varchar, typeof({sql}) from truth where {sql} is not null order by 1"
        ).fetchall()
        step = max(1, len(values) // request["values"])
        for text, of in values[::step]:
            literal = "'" + text.replace("'", "''") + f"'::{of}"
            wheres.extend(f"{sql} {operator} {literal}" for operator in ("=", ">", "<="))
        for where in wheres:
            if (theirs := count(source, where)) != (ours := count("truth", where)):
                raise AssertionError(f"duckdb: {theirs} rows, expected {ours} where {where}")

        distinct = pc.unique(column.drop_null())
        scans = [(ex.IsNull(name), pc.is_null(column)), (ex.NotNull(name), pc.is_valid(column))]
        if pa.types.is_floating(kind):
            scans.append((ex.IsNaN(name), pc.is_nan(column)))
        fewest[name] = request["files"]
        for scalar in list(distinct)[:: max(1, len(distinct) // request["values"])]:
            value = scalar.as_py()
            # For PyIceberg, no float32 is infinite.
            if isinstance(value, float) and (math.isnan(value) or math.isinf(value) and pa.types.is_float32(kind)):
                continue
            literal = value
            scans.append((ex.EqualTo(name, literal), pc.equal(column, scalar)))
            fewest[name] = min(fewest[name], len(list(table.scan(row_filter=ex.EqualTo(name, literal)).plan_files())))
            if not pa.types.is_boolean(kind):
                scans.append((ex.GreaterThanOrEqual(name, literal), pc.greater_equal(column, scalar)))
                scans.append((ex.LessThan(name, literal), pc.less(column, scalar)))
        for expression, expected in scans:
            ours = pc.sum(pc.cast(expected, pa.int64())).as_py() or 0
            theirs = table.scan(row_filter=expression, selected_fields=(request["key"],)).to_arrow().num_rows
            if theirs != ours:
                raise AssertionError(f"pyiceberg: {theirs} rows, expected {ours} where {expression}")
    return fewest


def statistics(table):
    """The counts and bounds of each file's columns, as readable values, files in the order of their names."""
    files = table.inspect.data_files().to_pylist()
    found = []
    for file in sorted(files, key=lambda f: f["file_path"]):
        metrics = {}
        for name, of in file["readable_metrics"].items():
            metrics[name] = {
                key: canonical(value, pa.null()) if not isinstance(value, dict) else None for key, value in of.items()
            }
        found.append(metrics)
    return found
