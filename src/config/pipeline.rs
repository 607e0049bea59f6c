//! Compiles the SQL of a pipeline against its schema, to find what is wrong with it before anything runs.

use super::{ExpectationConfig, TypeConfig, WindowConfig};
use crate::quality::Expectations;
use crate::state::WindowQuery;
use crate::transform::Transform;

/// The mistakes, each with its key.
pub fn compile_pipeline(
    types: &[TypeConfig],
    expectations: &[ExpectationConfig],
    windows: &[WindowConfig],
) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (of, message_type) in types.iter().enumerate() {
        let columns = match Transform::compile(&message_type.transform, &message_type.schema.arrow) {
            Ok(transform) => transform.output_schema(),
            // Windows may use the very columns that are wrong.
            Err(problems) => {
                found.extend(problems.iter().map(|p| with_key("", &of_type(of, message_type, p))));
                continue;
            }
        };
        for (index, expectation) in expectations.iter().enumerate().filter(|(_, e)| e.of == of) {
            if let Err(problem) = Expectations::compile_one(expectation, &columns) {
                found.push((format!("quality.expect.{index}.sql"), problem));
            }
        }
        let Some(event_time) = &message_type.event_time else { continue };
        for (index, window) in windows.iter().enumerate().filter(|(_, w)| w.of == of) {
            if let Err(problems) = WindowQuery::compile(window, &columns, event_time) {
                let subject = format!("window table {}: ", window.table.table);
                let section = format!("windows.{index}.");
                found.extend(problems.iter().map(|p| with_key(&section, p.strip_prefix(&subject).unwrap_or(p))));
            }
        }
    }
    found
}

/// Where `[transform]` has its settings, a type has its own.
fn of_type(of: usize, message_type: &TypeConfig, problem: &str) -> String {
    match problem.strip_prefix("transform.") {
        Some(rest) if !message_type.name.is_empty() => format!("types.{of}.{rest}"),
        _ => problem.to_string(),
    }
}

/// The compilers' messages begin with what they are about: `transform.filter = "…": …`, `group_by: …`.
fn with_key(section: &str, message: &str) -> (String, String) {
    let end = message.find([' ', ':']).unwrap_or(0);
    let problem = message[end..].trim_start_matches([' ', ':', '=']);
    (format!("{section}{}", &message[..end]), problem.to_string())
}
