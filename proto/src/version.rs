//! Which versions of LoraFleet's programs work together: those at most one minor version apart, so that a fleet is brought
//! up to date one machine at a time.

use crate::convert::ConvertError;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Refuses an agent whose version does not work with this program's.
///
/// # Errors
/// It does not, or is none.
pub fn check_agent(theirs: &str) -> Result<(), ConvertError> {
    check(VERSION, theirs).map_err(|problem| ConvertError::new("hello.agent.version", problem))
}

fn check(ours: &str, theirs: &str) -> Result<(), String> {
    let (Some(our), Some(their)) = (parse(ours), parse(theirs)) else {
        return Err(format!("{theirs:?} is no version"));
    };
    if our.0 == their.0 && our.1.abs_diff(their.1) <= 1 {
        return Ok(());
    }
    let old = if their < our { "the agent" } else { "the coordinator" };
    Err(format!(
        "an agent of version {theirs} does not work with a coordinator of version {ours}: they may be one minor version \
         apart; bring {old} up to date"
    ))
}

/// Major and minor.
fn parse(version: &str) -> Option<(u64, u64)> {
    let mut numbers = version.split(['.', '-', '+']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_minor_version_apart() {
        // (coordinator, agent, what is to be brought up to date)
        let rows = [
            ("0.1.0", "0.1.7", None),
            ("0.1.0", "0.2.0", None),
            ("0.2.3-rc.1", "0.1.0", None),
            ("0.3.0", "0.1.9", Some("the agent")),
            ("0.1.0", "0.3.0", Some("the coordinator")),
            ("1.0.0", "0.9.0", Some("the agent")),
            ("1.0.0", "2.0.0", Some("the coordinator")),
            ("0.1.0", "", Some("is no version")),
            ("0.1.0", "fake", Some("is no version")),
        ];
        for (ours, theirs, expected) in rows {
            let found = check(ours, theirs).err();
            let as_expected = match (&found, expected) {
                (None, None) => true,
                (Some(why), Some(part)) => why.contains(part),
                _ => false,
            };
            assert!(as_expected, "{ours} {theirs}: {found:?}");
        }
    }
}
