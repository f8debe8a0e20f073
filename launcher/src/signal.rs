//! Signals by name and number.

use crate::failure::Failure;

/// Linux's signals on x86_64 and aarch64, from 1 on.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// The number of `TERM`, `SIGTERM`, `15`, `RTMIN+3` or `SIGRTMAX-1`.
pub(crate) fn parse(text: &str) -> Result<u32, Failure> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let number = if let Ok(number) = name.parse() {
        Some(number)
    } else if let Some(place) = NAMES.iter().position(|known| *known == name) {
        u32::try_from(place + 1).ok()
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest, '+').and_then(|n| RTMIN.checked_add(n))
    } else {
        name.strip_prefix("RTMAX").and_then(|rest| offset(rest, '-')).and_then(|n| RTMAX.checked_sub(n))
    };
    let known = |number: &u32| (1..=31).contains(number) || (RTMIN..=RTMAX).contains(number);
    number.filter(known).ok_or_else(|| {
        let text: String = text.chars().take(32).collect();
        Failure::new(format!(
            "there is no signal {text:?}: give a name such as TERM or a number from 1 to {RTMAX}"
        ))
    })
}

fn offset(rest: &str, sign: char) -> Option<u32> {
    if rest.is_empty() { Some(0) } else { rest.strip_prefix(sign)?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigkill", 9),
            ("15", 15),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
            ("RTMIN", 34),
            ("SYS", 31),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
    }

    #[test]
    fn others_are_refused() {
        for text in
            ["", "0", "32", "65", "-1", "SIG", "NOPE", "RTMIN-1", "RTMAX+1", "RTMIN+31", "RTMIN+99999999999"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
