"""Links from an untrusted folder to files and folders of the user."""

from pathlib import Path


def snapshot(folder: Path) -> dict[str, object]:
    """Return every path below a folder with its content, or None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Outside:
    """A folder of the user, to which links are planted; it must not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = folder / "target"
        folder.mkdir()
        self._before = snapshot(folder)

    def plant(self, link: Path, is_folder: bool, exists: bool) -> None:
        """Create `link` to a file or folder of the user, or to an unused name in it."""
        self.target = self.folder / f"target_of_{link.name}_{exists}"
        if exists and is_folder:
            self.target.mkdir(exist_ok=True)
            (self.target / "notes").write_text("mine\n")
        elif exists:
            self.target.write_text("seed: 0\n")  # a configuration, too
        link.symlink_to(self.target)
        self._before = snapshot(self.folder)

    def changes(self) -> list[str]:
        """Return the paths that were changed, created or deleted since the last link was planted."""
        now = snapshot(self.folder)
        return [path for path in {**now, **self._before} if now.get(path, 0) != self._before.get(path, 0)]
