//! The feature name table of the header ("Feature name table"): what a tool can say about a bit that it does not know.

/// The names of the feature bits, for tools that meet one they do not know.
pub(super) fn feature_names() -> Vec<u8> {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = Vec::with_capacity(NAMES.len() * 48);
    for (kind, bit, name) in NAMES {
        let start = out.len();
        out.extend_from_slice(&[kind, bit]);
        out.extend_from_slice(name.as_bytes());
        out.resize(start + 48, 0);
    }
    out
}
