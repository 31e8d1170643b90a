"""Prints all that can be seen of a tree but for times: a line for each entry, by path."""
import hashlib
import os
import stat
import sys

root = os.fsencode(sys.argv[1])
links = {}


def show(path):
    s = os.lstat(path)
    name = os.path.relpath(path, root)
    said = [oct(s.st_mode), s.st_uid, s.st_gid]
    if not stat.S_ISDIR(s.st_mode):
        # Which names are one file, whatever its number.
        said += [s.st_nlink, s.st_size, links.setdefault(s.st_ino, name)]
    else:
        said += [s.st_nlink]
    if stat.S_ISLNK(s.st_mode):
        said.append(os.readlink(path))
    if stat.S_ISREG(s.st_mode):
        with open(path, "rb") as file:
            said.append(hashlib.file_digest(file, "sha256").hexdigest())
    if stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode):
        said.append(s.st_rdev)
    attributes = sorted((x, os.getxattr(path, x, follow_symlinks=False)) for x in os.listxattr(path, follow_symlinks=False))
    print(name, *said, attributes)


show(root)
for folder, folders, files in os.walk(root):
    folders.sort()
    for entry in sorted(folders + files):
        show(os.path.join(folder, entry))
