//! What becomes of the tables at a start: one plan, shown by `floe check` and carried out by `floe run`.
//!
//! Invariants: nothing is created or changed before every table is known to fit; a plan that a competing writer has
//! overtaken is made anew, never forced; carrying it out again changes nothing.

use std::fmt;
use std::time::Duration;

use super::catalog::{Catalog, CommitError, LoadedTable, TableChange, TableName};
use super::evolution::{self, Change, Evolution};
use super::{TableSpec, layout};
use crate::retry::{Strategy, random};
use crate::sink::Error;

const ATTEMPTS: u32 = 20;
const BACKOFF: Strategy = Strategy::Exponential { initial: Duration::from_millis(20), max: Duration::from_secs(2) };

/// What a start does to one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablePlan {
    /// `namespace.table`.
    pub table: String,
    pub step: TableStep,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableStep {
    Create,
    Keep,
    Evolve(Vec<Change>),
    /// Why it cannot be used, and what to do about it.
    Refuse(String),
}

impl fmt::Display for TablePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.step {
            TableStep::Create => write!(f, "{}: will be created", self.table),
            TableStep::Keep => write!(f, "{}: fits", self.table),
            TableStep::Evolve(changes) => write!(f, "{}: will {}", self.table, evolution::listed(changes)),
            TableStep::Refuse(reason) => f.write_str(reason),
        }
    }
}

/// A plan, and what it takes to carry it out.
pub struct Planned {
    pub plan: TablePlan,
    name: TableName,
    loaded: Option<LoadedTable>,
    evolved: Option<TableChange>,
}

/// Without a catalog there are no tables yet.
pub async fn plan(catalog: Option<&dyn Catalog>, specs: &[TableSpec]) -> Result<Vec<Planned>, Error> {
    let mut planned: Vec<Planned> = Vec::with_capacity(specs.len());
    for spec in specs {
        let name = TableName::parse(&spec.name)?;
        if planned.iter().any(|p| p.name == name) {
            return Err(Error::fatal(format!("table {name} is named twice: every output needs a table of its own")));
        }
        let loaded = match catalog {
            Some(catalog) => catalog.load(&name).await?,
            None => None,
        };
        let mut evolved = None;
        let step = match &loaded {
            None => match layout::creation(spec) {
                Ok(_) => TableStep::Create,
                Err(e) => TableStep::Refuse(e.to_string()),
            },
            Some(loaded) => match layout::evolution(spec, &loaded.metadata)? {
                Evolution::Same => TableStep::Keep,
                Evolution::Refuse(why) => TableStep::Refuse(refusal(&name, &why)),
                Evolution::Evolve { changes, schema } => match evolution::apply(&name, loaded, *schema) {
                    Ok(change) => {
                        evolved = Some(change);
                        TableStep::Evolve(changes)
                    }
                    // Such as a new column with the name of a partition field.
                    Err(e) => TableStep::Refuse(refusal(&name, &format!("  {}: {e}", evolution::listed(&changes)))),
                },
            },
        };
        planned.push(Planned { plan: TablePlan { table: name.to_string(), step }, name, loaded, evolved });
    }
    Ok(planned)
}

fn refusal(table: &TableName, why: &str) -> String {
    format!(
        "table {table} does not fit the pipeline. Mend what is marked ! in the schema or in the table, or write to a new table:\n{why}"
    )
}

/// Every table as it has to be, in the order of the specs.
pub async fn carry_out(
    catalog: &dyn Catalog,
    pipeline: &str,
    specs: &[TableSpec],
) -> Result<Vec<(TableName, LoadedTable)>, Error> {
    let mut overtaken = String::new();
    for attempt in 0..ATTEMPTS {
        let planned = plan(Some(catalog), specs).await?;
        let refused: Vec<&str> = planned
            .iter()
            .filter_map(|p| if let TableStep::Refuse(why) = &p.plan.step { Some(why.as_str()) } else { None })
            .collect();
        if !refused.is_empty() {
            return Err(Error::fatal(format!("{}\nnothing was read, and no table was changed", refused.join("\n"))));
        }
        let missing: Vec<_> = planned.iter().zip(specs).filter(|(p, _)| p.loaded.is_none()).collect();
        if !missing.is_empty() {
            for (Planned { name, .. }, spec) in missing {
                let created = catalog.create(name, layout::creation(spec)?).await?;
                tracing::info!(table = %name, pipeline, location = created.metadata.location(), "created table");
            }
            // Someone else may have created one of them in another form: look again.
            continue;
        }
        if planned.iter().all(|p| p.evolved.is_none()) {
            return Ok(planned.into_iter().filter_map(|p| Some((p.name, p.loaded?))).collect());
        }
        let (plans, changes): (Vec<_>, Vec<_>) = planned.into_iter().filter_map(|p| Some((p.plan, p.evolved?))).unzip();
        let together = if catalog.commits_together() { changes.len() } else { 1 };
        for (plans, changes) in plans.chunks(together).zip(changes.chunks(together)) {
            match catalog.commit(changes).await {
                Ok(()) => {
                    for plan in plans {
                        if let TableStep::Evolve(changes) = &plan.step {
                            tracing::info!(table = plan.table, changes = evolution::listed(changes), "evolved table");
                        }
                    }
                }
                Err(CommitError::Conflict(message)) => {
                    overtaken = message;
                    tokio::time::sleep(BACKOFF.delay(attempt, random())).await;
                    break;
                }
                Err(CommitError::Failed(error)) => return Err(error),
            }
        }
    }
    Err(Error::transient(format!("the tables could not be made to fit in {ATTEMPTS} attempts: {overtaken}")))
}
