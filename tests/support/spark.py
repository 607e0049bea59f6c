"""Spark with Iceberg's own runtime, at work on the tables that Floe writes.

One JSON request a line on stdin, one JSON answer a line on stdout. One Spark for all requests; every Iceberg catalog has a
session of its own, in which it is called `floe`. The arguments are the jars.
"""

import json
import os
import sys
import traceback

from pyspark.sql import SparkSession
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DateType,
    DoubleType,
    FloatType,
    MapType,
    StringType,
    StructType,
    TimestampType,
)

SETTINGS = {
    "spark.driver.memory": "640m",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    # Compiling a query takes longer than a small one does.
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.extensions": "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions",
    "spark.sql.shuffle.partitions": "2",
    # Plans stay as they are made, so that each scan's metrics can be found.
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.exchange.reuse": "false",
    # Rows are handed over in Parquet, exactly.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
}


def start(jars):
    builder = SparkSession.builder.master("local[2]").config("spark.driver.extraClassPath", ":".join(jars))
    for setting, value in SETTINGS.items():
        builder = builder.config(setting, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def session(spark, sessions, catalog):
    if catalog in sessions:
        return sessions[catalog]
    opened = spark.newSession()
    properties = {"": "org.apache.iceberg.spark.SparkCatalog", ".cache-enabled": "false"}
    if catalog.startswith("http"):
        properties |= {".type": "rest", ".uri": catalog}
    else:
        properties |= {
            ".type": "jdbc",
            ".uri": f"jdbc:sqlite:{catalog}?busy_timeout=10000",
            ".jdbc.schema-version": "V1",
            # Else it leaves a query open at the start, and with SQLite sees for ever what there was then.
            ".jdbc.init-catalog-tables": "false",
            ".warehouse": f"file://{os.path.dirname(catalog)}/warehouse",
        }
    for key, value in properties.items():
        opened.conf.set(f"spark.sql.catalog.floe{key}", value)
    opened.conf.set("spark.sql.defaultCatalog", "floe")
    sessions[catalog] = opened
    return opened


def leaves(schema, path=()):
    for field in schema.fields:
        if isinstance(field.dataType, StructType):
            yield from leaves(field.dataType, (*path, field.name))
        elif not isinstance(field.dataType, (ArrayType, MapType)):
            yield (*path, field.name), field.dataType


def literals(kind):
    """How a value becomes text, and how text becomes a literal of that value."""
    if isinstance(kind, StringType):
        return "hex({})", "cast(unhex('{}') as string)"
    if isinstance(kind, BinaryType):
        return "hex({})", "unhex('{}')"
    if isinstance(kind, TimestampType):
        return "unix_micros({})", "timestamp_micros({})"
    if isinstance(kind, DateType):
        return "unix_date({})", "date_from_unix_date({})"
    return "cast({} as string)", f"cast('{{}}' as {kind.simpleString()})"


def planned_files(frame):
    """Of every scan of a query that has run: how many data files it has read."""
    plan = frame._jdf.queryExecution().executedPlan()
    scans = plan.collectLeaves()
    files = []
    for i in range(scans.size()):
        found = scans.apply(i).metrics().get("resultDataFiles")
        if found.isDefined():
            files.append(found.get().value())
    return files


def matching(opened, table, column, wheres):
    """How many rows each filter lets through, and the query that has found out."""
    # Rows, not counts, which Iceberg would take from the manifests.
    scans = [f"select {i} i, {column} c from {table} where {where}" for i, where in enumerate(wheres)]
    frame = opened.sql(f"select i, sum(1) from ({' union all '.join(scans)}) group by i")
    found = dict(map(tuple, frame.collect()))
    return frame, [found.get(i, 0) for i in range(len(wheres))]


def filters(opened, table, rows, values):
    """By column: the fewest files read for one of its values. Every filter has to find all rows, as has every aggregate."""
    opened.read.parquet(rows).createOrReplaceTempView("unfiltered")
    fewest = {}
    for path, kind in leaves(opened.table(table).schema):
        column = ".".join(f"`{part}`" for part in path)
        to_text, to_literal = literals(kind)
        distinct = f"select distinct {to_text.format(column)} v, {column} o from unfiltered where {column} is not null"
        found = opened.sql(f"select v from ({distinct}) order by o")
        texts = [row.v for row in found.collect()]
        chosen = [to_literal.format(text) for text in texts[:: max(1, len(texts) // values)]]
        equalities = [f"{column} = {literal}" for literal in chosen]
        wheres = [f"{column} is null", f"{column} is not null"]
        wheres += [f"{column} {operator} {literal}" for literal in chosen for operator in (">", "<=")]
        is_float = isinstance(kind, (FloatType, DoubleType))
        wheres.append(f"isnan({column})" if is_float else f"{column} in ({', '.join(chosen)})")
        wheres = equalities + wheres
        counts = ", ".join(f"count_if({where})" for where in wheres)
        expected = list(opened.sql(f"select {counts} from unfiltered").collect()[0])
        equal, found = matching(opened, table, column, equalities)
        found += matching(opened, table, column, wheres[len(equalities) :])[1]
        for i, where in enumerate(wheres):
            if found[i] != expected[i]:
                raise AssertionError(f"spark: {found[i]} rows, expected {expected[i]} where {where}")
        fewest[".".join(path)] = min(planned_files(equal))
        # Zero has no sign as a bound.
        zero = " + 0d" if is_float else ""
        text = lambda aggregate: to_text.format(f"{aggregate}({column}){zero}")
        aggregates = f"count({column}), {text('min')}, {text('max')}"
        theirs, ours = (list(opened.sql(f"select {aggregates} from {of}").collect()[0]) for of in (table, "unfiltered"))
        if theirs != ours:
            raise AssertionError(f"spark: count, min, max of {column}: {theirs}, expected {ours}")
    return fewest


def answer(spark, sessions, request):
    opened = session(spark, sessions, request["catalog"])
    match request["op"]:
        case "sql":
            return [list(row) for row in opened.sql(request["sql"]).collect()]
        case "rows":
            return opened.sql(request["sql"]).coalesce(1).write.parquet(request["to"])
        case "filters":
            return filters(opened, request["table"], request["rows"], request["values"])
        case other:
            raise ValueError(f"unknown request {other}")


def main():
    answers = os.fdopen(os.dup(1), "w")
    # Whatever Spark prints is no answer.
    os.dup2(2, 1)
    spark, sessions = start(sys.argv[1:]), {}
    for line in sys.stdin:
        try:
            reply = {"ok": answer(spark, sessions, json.loads(line))}
        except Exception:
            reply = {"error": traceback.format_exc()}
        answers.write(json.dumps(reply, default=str) + "\n")
        answers.flush()


main()
