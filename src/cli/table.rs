//! Text in columns.

/// Rows under headings, as wide as their longest cell. Numbers are put to the right.
pub(super) fn render(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let is_number = |cell: &str| !cell.is_empty() && cell.chars().all(|c| c.is_ascii_digit());
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells
            .zip(&widths)
            .map(|(cell, &width)| if is_number(cell) { format!("{cell:>width$}") } else { format!("{cell:<width$}") });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let head = line(&mut headings.iter().copied());
    let body = rows.iter().map(|row| line(&mut row.iter().map(String::as_str)));
    [head].into_iter().chain(body).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let rows = [vec!["db-server".to_owned(), "2".to_owned()], vec!["ü".to_owned(), "10".to_owned()]];
        assert_eq!(render(&["name", "disks"], &rows), "name       disks\ndb-server      2\nü             10");
    }
}
