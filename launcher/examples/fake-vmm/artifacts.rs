//! What is installed beside the stand-in for the VMM, and passes for a kernel and for a guest image.

/// The beginning of a kernel.
pub(crate) fn elf() -> Vec<u8> {
    let mut elf = vec![0; 4096];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (elf[16], elf[18]) = (2, 62);
    elf
}

/// The beginning of an EROFS. In a guest image, the directive tells how the machine boots.
pub(crate) fn erofs(directive: &str) -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[..directive.len()].copy_from_slice(directive.as_bytes());
    image[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
    image[1036] = 12;
    image[1060] = 1;
    image
}
