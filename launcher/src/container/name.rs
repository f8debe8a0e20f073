//! Ids and names of containers.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::failure::Failure;

/// Digits of an id: those of a `u64`.
pub(crate) const ID_LENGTH: usize = 16;
/// Longest name, in bytes.
const NAME_MAX: usize = 63;

const QUALITIES: [&str; 16] = [
    "brisk", "calm", "deft", "even", "fair", "glad", "keen", "lithe", "merry", "neat", "plain", "quick",
    "ready", "sound", "tidy", "warm",
];
const THINGS: [&str; 16] = [
    "anchor", "beacon", "capstan", "davit", "fender", "galley", "hatch", "jetty", "keel", "lantern", "mast",
    "pennant", "rudder", "sextant", "tiller", "winch",
];

/// A new id and, for those who want none of their own, a name.
pub(crate) fn generate() -> Result<(String, String), Failure> {
    let mut random = [0; size_of::<u64>()];
    getrandom(&mut random, GetRandomFlags::empty())?;
    let id = format!("{:0width$x}", u64::from_ne_bytes(random), width = ID_LENGTH);
    let [a, b, ..] = random;
    let name = format!(
        "{}-{}-{}",
        QUALITIES[usize::from(a % 16)],
        THINGS[usize::from(b % 16)],
        &id[ID_LENGTH - 4..]
    );
    Ok((id, name))
}

/// True for what may be an id of [`generate`].
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == ID_LENGTH && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Refuses what cannot be a name.
pub(crate) fn check(name: &str) -> Result<(), Failure> {
    let mut bytes = name.bytes();
    let good = name.len() <= NAME_MAX
        && bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if good {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_MAX).collect();
    Err(Failure::new(format!(
        "{shown:?} cannot be a name: give up to {NAME_MAX} letters, digits, '_', '.' or '-', beginning with a letter or a digit"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names_and_ids_are_good_and_differ() {
        let (id, name) = generate().unwrap();
        assert!(bulkhead_protocol::limits::is_valid_id(&id));
        assert!(is_id(&id) && !is_id(&id[1..]) && !is_id("systemd-resolved"));
        check(&name).unwrap();
        assert_ne!(generate().unwrap().0, id);
    }

    #[test]
    fn names_that_would_leave_a_directory_or_confuse_a_table_are_refused() {
        for bad in ["", "-x", ".", "..", "a/b", "a b", "a\n", "ä", &"x".repeat(64)] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        check("web-1.a_b").unwrap();
    }
}
