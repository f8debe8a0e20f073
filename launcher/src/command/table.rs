//! Tables on standard output.

use crate::message::printable;

/// Space between columns.
const GAP: usize = 3;

/// Lines with aligned columns; the last column is not padded. What a terminal would act upon is escaped.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default() + GAP).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.concat().trim_end());
        text.push('\n');
    }
    text
}

/// A text of at most `length` characters, shortened if need be.
pub(crate) fn shortened(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    text.chars().take(length.saturating_sub(1)).chain(['…']).collect()
}

/// How long ago something was.
pub(crate) fn ago(then_ns: u64, now_ns: u64) -> String {
    let seconds = now_ns.saturating_sub(then_ns) / 1_000_000_000;
    let (number, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3_600 => (seconds / 60, "minute"),
        3_600..86_400 => (seconds / 3_600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{number} {unit}{} ago", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_characters() {
        let rows = [vec!["ID".into(), "NAME".into()], vec!["äöü".into(), "x".into()]];
        assert_eq!(table(&rows), "ID    NAME\näöü   x\n");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn a_cell_can_neither_steer_the_terminal_nor_begin_a_line() {
        assert_eq!(table(&[vec!["a\x1b[2J\nb".into(), "x".into()]]), "a\\x1b[2J\\nb   x\n");
    }

    #[test]
    fn long_texts_are_shortened() {
        assert_eq!(shortened("abcdef", 4), "abc…");
        assert_eq!(shortened("äöü", 3), "äöü");
    }

    #[test]
    fn times_are_told_in_their_largest_unit() {
        const SECOND: u64 = 1_000_000_000;
        assert_eq!(ago(0, SECOND), "1 second ago");
        assert_eq!(ago(0, 150 * SECOND), "2 minutes ago");
        assert_eq!(ago(0, 49 * 3600 * SECOND), "2 days ago");
        assert_eq!(ago(5 * SECOND, 0), "0 seconds ago");
    }
}
