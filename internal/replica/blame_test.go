package replica

import "testing"

// What each side wrote is 1; rot makes it 2. A copy is written over only by what
// was written.
func TestBlame(t *testing.T) {
	holds, rot := View{true, 1, true, 1}, View{true, 2, true, 1}
	dead, deadBare := View{Keeps: true, Kept: 1}, View{}
	bare, bareRot := View{Read: true, Is: 1}, View{Read: true, Is: 2}
	stale, sumRot := View{true, 3, true, 3}, View{true, 1, true, 9}
	for _, c := range []struct {
		name         string
		mine, theirs View
		want         Blame
	}{
		{"both good", holds, holds, NobodyWrong},
		{"mine rotten", rot, holds, MineWrong},
		{"mine cannot be read", dead, holds, MineWrong},
		{"mine cannot be read and has no checksum", deadBare, holds, MineWrong},
		{"mine without checksum differs", bareRot, holds, MineWrong},
		{"mine rotten, theirs without checksum is what was written here", rot, bare, MineWrong},
		{"mine cannot be read, theirs without checksum is what was written here", dead, bare, MineWrong},
		{"mine rotten, theirs without checksum is something else", rot, View{Read: true, Is: 7}, NeitherHolds},
		{"the checksum here is rotten, the data are equal", sumRot, holds, MineWrong},
		{"checksums of neither, equal", bare, bare, NobodyWrong},
		{"one without checksum, equal", holds, bare, NobodyWrong},
		{"checksums of neither, different", bare, bareRot, NeitherHolds},
		{"both hold, different", holds, stale, BothHold},
		{"both rotten", rot, View{true, 5, true, 1}, NeitherHolds},
		{"both cannot be read", dead, dead, NeitherHolds},
		{"both rotten in the same way", rot, rot, NeitherHolds},
		{"both rotten checksums, equal data", sumRot, sumRot, NeitherHolds},
		{"theirs is what mine should be, and its own checksum is rotten", rot, sumRot, MineWrong},
	} {
		same := c.mine.Read && c.theirs.Read && c.mine.Is == c.theirs.Is
		if got := BlameBlock(c.mine, c.theirs, same); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		mirrored := map[Blame]Blame{MineWrong: TheirsWrong, TheirsWrong: MineWrong}
		want, ok := mirrored[c.want]
		if !ok {
			want = c.want
		}
		if got := BlameBlock(c.theirs, c.mine, same); got != want {
			t.Errorf("%s, from the other side: %s, want %s", c.name, got, want)
		}
	}
}

// Whatever the two sides look like: what is written over never was the only copy of
// what its own side wrote.
func TestBlameNeverTheGoodOne(t *testing.T) {
	var all []View
	for _, read := range []bool{false, true} {
		for is := range uint32(4) {
			for kept := range uint32(4) {
				for _, keeps := range []bool{false, true} {
					all = append(all, View{read, is, keeps, kept})
				}
			}
		}
	}
	for _, m := range all {
		for _, o := range all {
			for _, same := range []bool{false, true} {
				switch b := BlameBlock(m, o, same); {
				case b == MineWrong && m.Holds(), b == TheirsWrong && o.Holds():
					t.Fatalf("%+v and %+v: %s, whose checksum holds", m, o, b)
				case b == MineWrong && !o.Read, b == TheirsWrong && !m.Read:
					t.Fatalf("%+v and %+v: %s, by what cannot be read", m, o, b)
				case b == NobodyWrong && (!same || m.Fails() || o.Fails()):
					t.Fatalf("%+v and %+v: %s", m, o, b)
				}
			}
		}
	}
}
