//! Texts out of images as errors show them. An image decides how long its names are; a terminal and a log should not suffer.

/// More of a name does not help who reads it.
const EXCERPT_MAX: usize = 200;

/// The beginning of a text, or all of it if it is short.
pub(crate) fn excerpt(text: &str) -> String {
    let end = text.floor_char_boundary(EXCERPT_MAX);
    if end == text.len() { text.into() } else { format!("{}...", &text[..end]) }
}

/// The same of what should be text.
pub(crate) fn excerpt_of_bytes(bytes: &[u8]) -> String {
    // Looked at no further than needed to know that there is more.
    excerpt(&String::from_utf8_lossy(&bytes[..bytes.len().min(EXCERPT_MAX + 1)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        let most = "x".repeat(EXCERPT_MAX);
        assert_eq!(excerpt(&most), most);
        assert_eq!(excerpt_of_bytes(most.as_bytes()), most);
        assert_eq!(excerpt(&format!("{most}x")), format!("{most}..."));
        assert_eq!(excerpt_of_bytes(&[b'x'; 5000]), format!("{most}..."));
        assert_eq!(excerpt(&format!("x{}", "é".repeat(100))), format!("x{}...", "é".repeat(99)));
        assert!(excerpt_of_bytes(&[0xff; 5000]).len() <= EXCERPT_MAX + 3);
    }
}
