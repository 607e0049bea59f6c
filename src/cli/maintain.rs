//! `floe maintain`: one round of maintenance over the tables of a pipeline, and what it did.
//!
//! It may run while the pipeline does: both look at a table anew before they change it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Error;
use crate::config::Config;
use crate::error::Error as QueryError;
use crate::sink::iceberg::{Maintainer, Round, TableReport};

pub async fn maintain(config: &Config, dry_run: bool) -> Result<Vec<TableReport>, Error> {
    let tables: Vec<String> = config.tables().map(|table| table.table.clone()).collect();
    let maintainer = Maintainer::open(&config.catalog, &tables).await.map_err(QueryError::from)?;
    let round = Round::new(config.maintenance.clone(), true);
    let round = if dry_run { round.dry() } else { round };
    let mut shutdown = super::run::on_signals(config.execution.shutdown_timeout)?;
    let stop = Arc::clone(&round.stop);
    tokio::spawn(async move {
        if shutdown.wait_for(|stop| *stop).await.is_ok() {
            stop.store(true, Ordering::Relaxed);
        }
    });
    Ok(maintainer.run(&round).await)
}
