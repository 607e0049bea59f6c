//! The HTTP server: `/metrics`, `/healthz`, `/readyz`, `/status` and a status page. It only reads.

use std::fmt::Write;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::{Health, State, Telemetry, rfc3339};

const JSON: &str = "application/json";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";

/// How long open connections may linger once the query has ended.
const DRAIN: Duration = Duration::from_secs(1);

/// Starts to serve, in a task of its own, and returns. Fails when the address cannot be listened on. `shutdown` turns
/// `/readyz` red; the server goes on while the batch in hand is finished, until the sender of `shutdown` is dropped.
pub async fn serve(listen: SocketAddr, telemetry: Telemetry, shutdown: watch::Receiver<bool>) -> io::Result<()> {
    let listener = bind(listen).await?;
    tracing::info!(address = %listen, "serving /metrics, /healthz, /readyz, /status and a status page");
    tokio::spawn(async move {
        if let Err(e) = serve_on(listener, telemetry, shutdown).await {
            tracing::error!(error = %e, "the http server stopped; the query goes on without it");
        }
    });
    Ok(())
}

/// Listens without answering yet: for callers that want to know early whether the port is free, or which one it became.
pub async fn bind(listen: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(listen).await.map_err(|e| {
        let hint = "choose another address in [http] listen, or \"\" for no HTTP server";
        io::Error::new(e.kind(), format!("cannot listen on {listen}: {e}; {hint}"))
    })
}

pub async fn serve_on(listener: TcpListener, telemetry: Telemetry, shutdown: watch::Receiver<bool>) -> io::Result<()> {
    let app = Router::new()
        .route("/", get(async |Shared(t): Shared<Telemetry>| answer(StatusCode::OK, HTML, t.render_page())))
        .route(
            "/metrics",
            get(async |Shared(t): Shared<Telemetry>| answer(StatusCode::OK, PROMETHEUS, t.render_metrics())),
        )
        .route("/healthz", get(async || answer(StatusCode::OK, JSON, "{\"alive\": true}\n".to_string())))
        .route("/readyz", get(async |Shared(t): Shared<Telemetry>| readyz(&t)))
        .route("/status", get(async |Shared(t): Shared<Telemetry>| answer(StatusCode::OK, JSON, t.render_status())))
        .with_state(telemetry.clone());
    let server = axum::serve(listener, app).with_graceful_shutdown(ended(shutdown.clone()));
    let cut_off = async {
        if shutdown.clone().wait_for(|stop| *stop).await.is_ok() {
            telemetry.stopping();
        }
        ended(shutdown).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = server.into_future() => result,
        () = cut_off => Ok(()),
    }
}

/// Returns once the sender is gone, and the query with it.
async fn ended(mut shutdown: watch::Receiver<bool>) {
    while shutdown.changed().await.is_ok() {}
}

fn readyz(telemetry: &Telemetry) -> Response {
    match telemetry.not_ready() {
        None => answer(StatusCode::OK, JSON, "{\"ready\": true}\n".to_string()),
        Some(reason) => {
            let body = serde_json::json!({"ready": false, "reason": reason});
            answer(StatusCode::SERVICE_UNAVAILABLE, JSON, format!("{body}\n"))
        }
    }
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response {
    (status, [(header::CONTENT_TYPE, content_type), (header::CACHE_CONTROL, "no-store")], body).into_response()
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b2733;background:#fff}\
h1{font-size:1.4rem;margin:0}h2{font-size:1rem;margin:2rem 0 .5rem}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}\
th,td{text-align:right;padding:.2rem .6rem;border-bottom:1px solid #e3e8ed}th{font-weight:600;color:#52606d}th:first-child,td:first-child{text-align:left}\
.ok{color:#0a7a43}.bad{color:#b42318}.dim{color:#52606d}pre{white-space:pre-wrap;background:#f5f7f9;padding:.6rem .8rem}\
@media(prefers-color-scheme:dark){body{color:#dde3e9;background:#14191f}th,.dim{color:#93a1af}th,td{border-color:#2a333c}pre{background:#1d242c}.ok{color:#4cc38a}.bad{color:#ff8b7e}}";

/// One page, no scripts, no assets of others; it reloads itself.
pub(super) fn page(query: &super::Shared, health: &Health, now_ms: i64) -> String {
    let mut html = String::with_capacity(8 * 1024);
    // Writing to a String cannot fail.
    let _ = write_page(&mut html, query, health, now_ms);
    html
}

fn write_page(out: &mut String, query: &super::Shared, health: &Health, now_ms: i64) -> std::fmt::Result {
    let name = escape(&query.name);
    let not_ready = health.not_ready(now_ms);
    let class = if not_ready.is_none() { "ok" } else { "bad" };
    let state = match health.state {
        State::Starting => "starting",
        State::Running => "running",
        State::Retrying => "retrying",
        State::Stopping => "stopping",
        State::Failed => "failed",
    };
    write!(
        out,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">"
    )?;
    write!(out, "<meta http-equiv=refresh content=2><title>{name} – Floe</title><style>{STYLE}</style>")?;
    write!(out, "<h1>{name} <span class={class}>{state}</span></h1>")?;
    write!(
        out,
        "<p class=dim>{} · since {} · Floe {}",
        escape(&health.guarantee),
        rfc3339(health.since_ms),
        env!("CARGO_PKG_VERSION")
    )?;
    write!(out, " · <a href=status>status</a> · <a href=metrics>metrics</a></p>")?;
    if let Some(reason) = &not_ready {
        write!(out, "<p class=bad>not ready: {}</p>", escape(reason))?;
    }
    let lag: u64 = health.lag.values().sum();
    let commit = health
        .last_commit_ms
        .map_or("none yet".to_string(), |ms| format!("{:.1} s ago", (now_ms - ms) as f64 / 1000.0));
    let watermark = health.watermark_ms.filter(|ms| *ms > 0).map_or("none yet".to_string(), rfc3339);
    write!(out, "<p>last commit {commit} · watermark {watermark} · lag {lag} in {} partitions</p>", health.lag.len())?;
    if let Some(held) = health.batches.back().and_then(|b| b.event_time.held_by.as_ref()) {
        let (topic, since) = (escape(&held.topic), rfc3339(held.since_ms));
        let (partition, batch) = (held.partition, held.since_batch);
        write!(out, "<p>the watermark is held back by {topic}-{partition} since batch {batch}, {since}</p>")?;
    }
    if let Some(e) = &health.last_error {
        write!(
            out,
            "<h2>Last error</h2><pre>{} {} (attempt {}): {}</pre>",
            e.at,
            e.kind,
            e.attempt,
            escape(&e.message)
        )?;
    }
    write!(
        out,
        "<h2>Last batches</h2><table><tr><th>batch<th>trigger<th>records<th>rows<th>filtered<th>dropped<th>dead<th>late<th>lag<th>seconds<th>records/s</tr>"
    )?;
    for b in health.batches.iter().rev() {
        let (time, dead, late, lag) = (escape(&b.timestamp), b.dead_letters(), b.late(), b.lag());
        let seconds = b.batch_duration_ms as f64 / 1000.0;
        write!(
            out,
            "<tr><td>{}<td>{time}<td>{}<td>{}<td>{}<td>{}<td>{dead}<td>{late}",
            b.batch_id, b.counts.records, b.counts.rows, b.counts.filtered, b.counts.dropped
        )?;
        write!(out, "<td>{lag}<td>{seconds:.3}<td>{:.0}</tr>", b.processed_rows_per_second)?;
    }
    write!(out, "</table>")?;
    if let Some(b) = health.batches.back() {
        write!(out, "<h2>Tables, batch {}</h2><table><tr><th>table<th>rows<th>files<th>snapshot</tr>", b.batch_id)?;
        for t in &b.sink.tables {
            let snapshot = t.snapshot_id.map_or("–".to_string(), |id| id.to_string());
            write!(out, "<tr><td>{}<td>{}<td>{}<td>{snapshot}</tr>", escape(&t.table), t.rows, t.files)?;
        }
        write!(out, "</table><h2>Open windows</h2><table><tr><th>table<th>windows<th>groups<th>bytes</tr>")?;
        for s in &b.state_operators {
            write!(
                out,
                "<tr><td>{}<td>{}<td>{}<td>{}</tr>",
                escape(&s.table),
                s.num_windows,
                s.num_rows_total,
                s.memory_used_bytes
            )?;
        }
        write!(out, "</table>")?;
    }
    write!(out, "</html>")
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::TopicPartition;
    use crate::error::Kind;
    use crate::telemetry::{BatchProgress, Counts, EventTime, StateOperator, TableProgress, WatermarkHeldBy};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn fetch(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: floe\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let status = text.split(' ').nth(1).unwrap().parse().unwrap();
        (status, text.split_once("\r\n\r\n").unwrap().1.to_string())
    }

    fn progress() -> BatchProgress {
        BatchProgress {
            batch_id: 41,
            timestamp: rfc3339(1_700_000_000_000),
            batch_duration_ms: 750,
            duration_ms: [("add_batch".to_string(), 600), ("commit_tables".to_string(), 100)].into(),
            event_time: EventTime {
                watermark_ms: Some(1_600_000_000_000),
                max_ms: Some(1_600_000_600_000),
                held_by: Some(WatermarkHeldBy { topic: "t".into(), partition: 3, since_batch: 40, since_ms: 0 }),
                ..EventTime::default()
            },
            state_operators: vec![StateOperator {
                table: "http.minutes".into(),
                num_rows_total: 17,
                ..Default::default()
            }],
            sink: crate::telemetry::SinkProgress {
                tables: vec![TableProgress { table: "http.events".into(), rows: 98, files: 1, snapshot_id: Some(5) }],
            },
            counts: Counts {
                offsets: 100,
                records: 100,
                rows: 98,
                dropped: 7,
                dead_letters: [("wrong_type".to_string(), 2)].into(),
                late: [("http.minutes".to_string(), 3)].into(),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn every_endpoint_answers() {
        let telemetry = Telemetry::new("<b>pipe</b>", "exactly once; 3 tables appear together (sqlite)");
        telemetry.query_id(uuid::Uuid::nil());
        telemetry.guarantee("exactly once".into());
        telemetry.tables(&["http.never".to_string()], &["http.minutes_never".to_string()]);
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let server = tokio::spawn(serve_on(listener, telemetry.clone(), stopped));

        assert_eq!(fetch(address, "/healthz").await.0, 200);
        let (status, body) = fetch(address, "/readyz").await;
        assert_eq!(status, 503);
        assert!(
            serde_json::from_str::<serde_json::Value>(&body).unwrap()["reason"].as_str().unwrap().contains("starting")
        );

        telemetry.running();
        assert_eq!(fetch(address, "/readyz").await.0, 200);
        telemetry.lag(&[(TopicPartition::new("http-topic", 3), 12)].into());
        telemetry.retrying("commit_tables: catalog <locked>", Kind::Indeterminate, 1, Duration::from_millis(250));
        telemetry.batch(progress());

        let (status, metrics) = fetch(address, "/metrics").await;
        assert_eq!(status, 200);
        for line in [
            "# HELP floe_batches_total Batches committed by this process.",
            "# TYPE floe_batch_stage_duration_seconds histogram",
            "floe_source_lag_records{topic=\"http-topic\",partition=\"3\"} 12",
            "floe_sink_rows_total{table=\"http.events\"} 98",
            "floe_sink_rows_total{table=\"http.never\"} 0",
            "floe_late_rows_total{table=\"http.minutes\"} 3",
            "floe_late_rows_total{table=\"http.minutes_never\"} 0",
            "floe_dead_letters_total{reason=\"too_deep\"} 0",
            "floe_state_groups{table=\"http.minutes\"} 17",
            "floe_watermark_timestamp_seconds 1600000000",
            "floe_last_commit_age_seconds ",
            "floe_batch_stage_duration_seconds_bucket{stage=\"add_batch\",le=\"1\"} ",
            "floe_build_info{version=",
            "floe_query_info{name=\"<b>pipe</b>\",query_id=\"00000000-",
        ] {
            assert!(metrics.contains(line), "{line} is not in\n{metrics}");
        }

        let (status, body) = fetch(address, "/status").await;
        assert_eq!(status, 200);
        let json: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(json["state"], "running");
        assert_eq!(json["ready"], true);
        assert_eq!(json["lag"], 12);
        assert_eq!(json["lastError"]["kind"], "indeterminate");
        assert_eq!(json["batches"][0]["sink"]["tables"][0]["rows"], 98);
        assert_eq!(json["batches"][0]["eventTime"]["watermark"], "2020-09-13T12:26:40Z");

        let (status, html) = fetch(address, "/").await;
        assert_eq!(status, 200);
        assert!(html.contains("&lt;b&gt;pipe") && !html.contains("<b>pipe"), "{html}");
        assert!(html.contains("catalog &lt;locked&gt;") && html.contains("http.events"));
        // Records, rows, filtered, dropped, dead letters, late.
        assert!(html.contains("<td>100<td>98<td>0<td>7<td>2<td>3"), "{html}");

        stop.send(true).unwrap();
        while telemetry.not_ready().is_none() {
            tokio::task::yield_now().await;
        }
        assert!(fetch(address, "/readyz").await.1.contains("stopping"), "it answers while the query finishes");
        telemetry.fatal("another owner");
        let (status, body) = fetch(address, "/readyz").await;
        assert_eq!(status, 503);
        assert!(body.contains("another owner"));
        assert_eq!(fetch(address, "/healthz").await.0, 200);
        assert_eq!(fetch(address, "/nothing").await.0, 404);

        drop(stop);
        tokio::time::timeout(Duration::from_secs(60), server).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error() {
        let first = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (_stop, stopped) = watch::channel(false);
        let error = serve(first.local_addr().unwrap(), Telemetry::new("t", "g"), stopped).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("[http] listen"), "{error}");
    }
}
