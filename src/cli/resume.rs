//! `floe resume`: lets the batch through that the circuit breaker of a pipeline holds back.
//!
//! It writes one file into the checkpoint and touches nothing else; the query, waiting now or started later, finds it.

use super::Error;
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::Error as QueryError;

/// What was let through, for the terminal.
pub async fn resume(config: &Config) -> Result<String, Error> {
    let location = crate::storage::open(&config.checkpoint_location).map_err(QueryError::from)?;
    let found = Checkpoint::inspect(location.clone()).await.map_err(QueryError::from)?;
    if found.is_none() {
        return Err(Error::Other(format!("there is no checkpoint at {} yet: nothing is held back", location.url)));
    }
    let checkpoint = Checkpoint::open(location, &config.name).await.map_err(QueryError::from)?;
    let recovered = checkpoint.recover().await.map_err(QueryError::from)?;
    let held = match recovered.replay() {
        Some(plan) => checkpoint.held(plan).await.map_err(QueryError::from)?.map(|held| (plan, held)),
        None => None,
    };
    let Some((plan, held)) = held else {
        return Err(Error::Other(format!("pipeline {} holds no batch back: there is nothing to resume", config.name)));
    };
    checkpoint.resume(plan).await.map_err(QueryError::from)?;
    Ok(format!(
        "batch {} of {} will be committed with its dead letters. It was held back since {}: {}\n\
         A running query goes on within seconds, one that has ended at its next start.",
        held.batch, config.name, held.held_at, held.reason
    ))
}
