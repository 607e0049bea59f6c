//! `floe state`: the open windows of a pipeline as its checkpoint has them. Reads and changes nothing, also beside a running query.

use std::fmt::Write;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::{Error, beside};
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::Error as QueryError;
use crate::pipeline::Pipeline;
use crate::state::{self, Numbers, Reader, WindowQuery};
use crate::telemetry::rfc3339;
use crate::window::UNSET_WATERMARK_MS;

/// What is open, for the terminal.
pub async fn state(config: &Config) -> Result<String, Error> {
    let pipeline =
        Pipeline::compile(config).map_err(|problems| Error::Query(QueryError::Compile(problems.join("\n"))))?;
    let location = crate::storage::open(&config.checkpoint_location).map_err(QueryError::from)?;
    let found = Checkpoint::inspect(location.clone()).await.map_err(QueryError::from)?;
    if found.is_none() {
        return Err(Error::Other(format!("there is no checkpoint at {} yet", location.url)));
    }
    let checkpoint = Arc::new(Checkpoint::open(location, &config.name).await.map_err(QueryError::from)?);
    let (recovered, files) = beside::read(&checkpoint, async |recovered| {
        let Some(commit) = &recovered.commit else { return Ok(Vec::new()) };
        let numbers = Numbers::of(&commit.windows, pipeline.queries.iter().map(WindowQuery::table));
        Ok(Reader::new(checkpoint.clone(), Handle::current(), numbers).open(&commit.state).await?)
    })
    .await?;
    let (Some(commit), Some(logged)) = (&recovered.commit, &recovered.plan) else {
        return Ok(format!("no batch of {} is committed yet: there is no state", config.name));
    };
    let watermarks = &logged.plan.watermarks;
    let evict_ms = if recovered.replay().is_some() { watermarks.late_ms } else { watermarks.evict_ms };
    let closes = evict_ms.map_or("no window is closed yet".to_string(), |ms| {
        format!("windows that end at or before {} are closed", rfc3339(ms))
    });
    let windows = state::open_windows(&files, evict_ms.unwrap_or(UNSET_WATERMARK_MS));
    let bytes: u64 = commit.state.iter().map(|f| f.bytes).sum();
    let mut text = format!(
        "{} after batch {}: {} open windows in {} state files of {bytes} bytes; {closes}\n\n",
        config.name,
        commit.batch,
        windows.len(),
        files.len(),
    );
    let name = |query: usize| pipeline.queries.get(query).map_or("?", |q| q.table());
    let width = pipeline.queries.iter().map(|q| q.table().len()).max().unwrap_or(0).max("table".len());
    let mut line = |cells: [&str; 6]| {
        let [table, start, end, groups, bytes, files] = cells;
        let _ = writeln!(text, "{table:<width$}  {start:<24}  {end:<24}  {groups:>10}  {bytes:>12}  {files:>5}");
    };
    line(["table", "window start", "window end", "groups", "bytes", "files"]);
    for window in windows {
        let time = |us: i64| rfc3339(us.div_euclid(1000));
        // A group that several files have some of is counted for each.
        let groups = format!("{}{}", if window.files > 1 { "<= " } else { "" }, window.groups);
        let (bytes, files) = (window.bytes.to_string(), window.files.to_string());
        // Sessions are kept by shares of their keys.
        let is_session = pipeline.queries.get(window.query).is_some_and(|q| q.is_session());
        let start = if is_session { format!("sessions, share {}", window.start_us) } else { time(window.start_us) };
        line([name(window.query), &start, &time(window.end_us), &groups, &bytes, &files]);
    }
    Ok(text)
}
