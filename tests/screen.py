"""A small VT100 screen: what a person would see on a terminal after these bytes.

It knows what line editors send: CR LF BS TAB, cursor moves, erasing, inserting and deleting characters and lines,
insert mode, scrolling, wide and combining characters, and the wrap that waits for the next character (xenl). Anything
else in escape sequences is read and ignored. Rows remember whether they ran over into the next one, so that wrapped
text reads as one line again.
"""

import codecs
import re
import unicodedata

CSI = re.compile(r"\x1b\[([?>=!]?)([0-9;:]*)[ -/]*([@-~])")
OTHER = re.compile(r"\x1b(?:\][^\x07\x1b]*(?:\x07|\x1b\\)|[()*+][ -~]|[ -/]*[0-OQ-WYZ\\^-~])")


def width(char):
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def layout(text, cols):
    """The rows that a text fills from the left margin on, and where the cursor is behind it: rows, x, y."""
    screen = Screen(cols, 1)
    screen.feed(text.encode())
    x = screen.x
    if screen.wrap_due:  # line editors do not leave the cursor hanging at the margin
        screen.put("\r")
        screen.put("\n")
        x = 0
    rows = [row.text().rstrip() for row in screen.gone + screen.grid]
    return rows, x, len(rows) - 1


class Row:
    """One row: a cell holds a character with its marks, "" behind a wide one, or None where nothing was written."""

    def __init__(self, cols):
        self.cells = [None] * cols
        self.runs_over = False

    def text(self):
        return "".join(" " if cell is None else cell for cell in self.cells)

    def written(self):
        """Without the end that nothing was written to: a wide character may not have fitted there."""
        cells = list(self.cells)
        while cells and cells[-1] is None:
            cells.pop()
        return "".join(" " if cell is None else cell for cell in cells)


class Screen:
    def __init__(self, cols=80, rows=24):
        self.cols, self.rows = cols, rows
        self.grid = [Row(cols) for _ in range(rows)]
        self.gone = []  # rows that scrolled off the top
        self.x = self.y = 0
        self.wrap_due = self.inserting = False
        self.saved = (0, 0)
        self.top, self.bottom = 0, rows - 1  # the scrolling region
        self.rest = ""  # an escape sequence not yet complete
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data):
        text = self.rest + self.decoder.decode(data)
        self.rest = ""
        at = 0
        while at < len(text):
            if text[at] != "\x1b":
                self.put(text[at])
                at += 1
                continue
            found = CSI.match(text, at) or OTHER.match(text, at)
            if not found:
                if len(text) - at > 64:  # never that long: let it be seen
                    self.put("?")
                    at += 1
                    continue
                self.rest = text[at:]
                return
            if found.re is CSI:
                self.control(*found.groups())
            else:
                self.escape(found.group())
            at = found.end()

    # ---- what is on it

    def visible(self):
        return [row.text().rstrip() for row in self.grid]

    def lines(self):
        """Everything ever shown, top to bottom, wrapped rows joined, without the empty rows at the end."""
        lines, part = [], ""
        for row in self.gone + self.grid:
            if row.runs_over:
                part += row.written()
            else:
                lines.append((part + row.text()).rstrip())
                part = ""
        if part:
            lines.append(part.rstrip())
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def history(self):
        """Every row ever shown, as it is: scrolled off, then visible; without the empty ones at the end."""
        rows = [row.text().rstrip() for row in self.gone + self.grid]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def has_at_cursor(self, before, behind=""):
        """Exactly this text stands around the cursor, from the left margin on, and nothing below it."""
        _, x, y = layout(before, self.cols)
        rows, _, _ = layout(before + behind, self.cols)
        places = [(self.x, self.y)]
        if self.wrap_due:  # it shows in the last column, and the next character goes to the next row
            places.append((0, self.y + 1))
        return any(here_x == x and here_y >= y and
                   self.visible()[here_y - y:] == (rows + [""] * self.rows)[:self.rows - here_y + y]
                   for here_x, here_y in places)

    # ---- characters

    def put(self, char):
        if char == "\r":
            self.x, self.wrap_due = 0, False
        elif char in "\n\v\f":
            self.line_feed()
        elif char == "\b":
            self.x, self.wrap_due = max(0, self.x - 1), False
        elif char == "\t":
            self.x, self.wrap_due = min(self.cols - 1, self.x // 8 * 8 + 8), False
        elif char >= " " and char != "\x7f":
            self.show(char)

    def show(self, char):
        wide = width(char)
        if wide == 0:
            self.mark(char)
            return
        if self.wrap_due or self.x + wide > self.cols:
            self.grid[self.y].runs_over = True
            self.x = 0
            self.line_feed()
        cells = self.grid[self.y].cells
        if self.inserting:
            self.insert_cells(wide)
        if cells[self.x] == "" and self.x > 0:
            cells[self.x - 1] = " "  # half of a wide character is left: neither half stays
        cells[self.x] = char
        if wide == 2:
            cells[self.x + 1] = ""
        behind = self.x + wide
        if behind < self.cols and cells[behind] == "":
            cells[behind] = " "
        self.wrap_due = behind >= self.cols
        self.x = min(behind, self.cols - 1)

    def mark(self, char):
        at = self.x if self.wrap_due else self.x - 1
        cells = self.grid[self.y].cells
        while at > 0 and cells[at] == "":
            at -= 1
        if at >= 0:
            cells[at] = (cells[at] or " ") + char

    def line_feed(self):
        self.wrap_due = False
        if self.y == self.bottom:
            self.scroll_up()
        elif self.y < self.rows - 1:
            self.y += 1

    def scroll_up(self, count=1):
        for _ in range(count):
            row = self.grid.pop(self.top)
            if self.top == 0:
                self.gone.append(row)
            self.grid.insert(self.bottom, Row(self.cols))

    def scroll_down(self, count=1):
        for _ in range(count):
            self.grid.pop(self.bottom)
            self.grid.insert(self.top, Row(self.cols))

    def insert_cells(self, count):
        row = self.grid[self.y]
        row.cells[self.x:self.x] = [None] * count
        del row.cells[self.cols:]
        row.runs_over = False

    # ---- sequences

    def escape(self, sequence):
        kind = sequence[1]
        if kind == "7":
            self.saved = (self.x, self.y)
        elif kind == "8":
            self.move(*self.saved)
        elif kind == "D":
            self.line_feed()
        elif kind == "E":
            self.x = 0
            self.line_feed()
        elif kind == "M":
            if self.y == self.top:
                self.scroll_down()
            else:
                self.move(self.x, self.y - 1)
        elif kind == "c":
            self.__init__(self.cols, self.rows)

    def move(self, x, y):
        self.x, self.y = min(max(x, 0), self.cols - 1), min(max(y, 0), self.rows - 1)
        self.wrap_due = False

    def control(self, private, text, final):
        numbers = [int(part or 0) for part in re.split("[;:]", text)]
        if final in "hl":
            if not private and 4 in numbers:
                self.inserting = final == "h"
            return
        if private:
            return
        first = numbers[0]
        count = max(first, 1)
        row = self.grid[self.y]
        if final == "A":
            self.move(self.x, self.y - count)
        elif final in "Be":
            self.move(self.x, self.y + count)
        elif final in "Ca":
            self.move(self.x + count, self.y)
        elif final == "D":
            self.move(self.x - count, self.y)
        elif final == "E":
            self.move(0, self.y + count)
        elif final == "F":
            self.move(0, self.y - count)
        elif final in "G`":
            self.move(count - 1, self.y)
        elif final == "d":
            self.move(self.x, count - 1)
        elif final in "Hf":
            self.move(max(numbers[1], 1) - 1 if len(numbers) > 1 else 0, count - 1)
        elif final == "J":
            self.erase_screen(first)
        elif final == "K":
            self.erase_line(first)
        elif final == "X":
            row.cells[self.x:self.x + count] = [None] * min(count, self.cols - self.x)
        elif final == "@":
            self.insert_cells(min(count, self.cols - self.x))
        elif final == "P":
            del row.cells[self.x:self.x + count]
            row.cells += [None] * (self.cols - len(row.cells))
            row.runs_over = False
        elif final in "LM":
            self.insert_or_delete_lines(final, count)
        elif final == "S":
            self.scroll_up(count)
        elif final == "T":
            self.scroll_down(count)
        elif final == "r":
            self.top = count - 1
            self.bottom = (numbers[1] if len(numbers) > 1 and numbers[1] else self.rows) - 1
            self.move(0, 0)
        elif final == "s":
            self.saved = (self.x, self.y)
        elif final == "u":
            self.move(*self.saved)

    def erase_line(self, how, y=None):
        row = self.grid[self.y if y is None else y]
        start, end = ((self.x, self.cols), (0, self.x + 1), (0, self.cols))[min(how, 2)]
        row.cells[start:end] = [None] * (end - start)
        if end == self.cols:
            row.runs_over = False
        self.wrap_due = False

    def erase_screen(self, how):
        if how == 0:
            self.erase_line(0)
            others = range(self.y + 1, self.rows)
        elif how == 1:
            self.erase_line(1)
            others = range(self.y)
        else:
            others = range(self.rows)
        for y in others:
            self.erase_line(2, y)

    def insert_or_delete_lines(self, final, count):
        if not self.top <= self.y <= self.bottom:
            return
        for _ in range(min(count, self.bottom - self.y + 1)):
            if final == "L":
                self.grid.pop(self.bottom)
                self.grid.insert(self.y, Row(self.cols))
            else:
                self.grid.pop(self.y)
                self.grid.insert(self.bottom, Row(self.cols))
        self.move(0, self.y)

    # ---- the window

    def resize(self, cols, rows):
        """As xterm does it: rows are cut or filled up, nothing flows; too many rows leave at the top."""
        for row in self.grid:
            row.cells = row.cells[:cols] + [None] * (cols - self.cols)
            row.runs_over = row.runs_over and cols == self.cols
        while len(self.grid) > rows:
            if self.y < len(self.grid) - 1 and not self.grid[-1].text().strip():
                self.grid.pop()
            else:
                self.gone.append(self.grid.pop(0))
                self.y -= 1
        self.grid += [Row(cols) for _ in range(rows - len(self.grid))]
        self.cols, self.rows, self.top, self.bottom = cols, rows, 0, rows - 1
        self.move(self.x, self.y)
