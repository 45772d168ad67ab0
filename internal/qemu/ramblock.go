package qemu

import (
	"bufio"
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// RAMBlock is one RAM block of QEMU.
type RAMBlock struct {
	Name string
	Used int64 // bytes
}

// ramBlockRE takes name, page size, offset and used length; further columns
// depend on the version. A name may hold blanks.
var ramBlockRE = regexp.MustCompile(`^\s*(\S.*?)\s+[0-9]+ [KMG]?i?B\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s`)

// RAMBlocks lists all RAM blocks (info ramblock).
func (q *QMP) RAMBlocks(ctx context.Context) ([]RAMBlock, error) {
	s, err := q.HumanCommand(ctx, "info ramblock")
	if err != nil {
		return nil, err
	}
	return parseRAMBlocks(s)
}

func parseRAMBlocks(s string) ([]RAMBlock, error) {
	var list []RAMBlock
	sc := bufio.NewScanner(strings.NewReader(s))
	for first := true; sc.Scan(); first = false {
		line := sc.Text()
		if first || strings.TrimSpace(line) == "" {
			continue // the heading
		}
		m := ramBlockRE.FindStringSubmatch(line + " ")
		if m == nil {
			return nil, fmt.Errorf("read info ramblock: unexpected line %q", line)
		}
		n, err := strconv.ParseInt(m[2], 16, 64)
		if err != nil {
			return nil, fmt.Errorf("read info ramblock: %w", err)
		}
		list = append(list, RAMBlock{Name: m[1], Used: n})
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("read info ramblock: no block in %q", s)
	}
	return list, nil
}

// harmlessBlocks are the blocks that a checkpoint may leave out, each with the
// reason. Anything not named here stands against Level 3.
var harmlessBlocks = []struct {
	re  *regexp.Regexp
	why string
}{
	{regexp.MustCompile(`^(/objects/)?` + RAMBlockID + `$`), "the memory that the checkpoints hold"},
	{regexp.MustCompile(`^pc\.bios$`), "firmware image, read-only to the guest, the same file on both hosts"},
	{regexp.MustCompile(`^pc\.rom$`), "option ROM area, read-only to the guest on machines with PCI, filled at start from the same files"},
	{regexp.MustCompile(`^/rom@`), "firmware table made by QEMU from the command line, not writable by the guest"},
}

// refusedBlocks gives the reason for blocks that people are likely to meet.
var refusedBlocks = []struct {
	re  *regexp.Regexp
	why string
}{
	{regexp.MustCompile(`^system\.flash`), "UEFI variables: the guest writes them and no checkpoint holds them"},
	{regexp.MustCompile(`vram|vga|qxl`), "memory of a VGA or QXL display: no checkpoint holds it; use virtio-gpu or no display"},
	{regexp.MustCompile(`\.rom$`), "option ROM of a device: give the device romfile="},
	{regexp.MustCompile(`shmem|nvdimm|pmem`), "memory shared with something outside the guest"},
}

// CheckRAMBlocks returns the blocks that a checkpoint of ram0 and the device
// state would miss, one sentence each; none means that nothing of the kind stands
// against Level 3.
func CheckRAMBlocks(blocks []RAMBlock) []string {
	var bad []string
	main := false
next:
	for _, b := range blocks {
		for i, h := range harmlessBlocks {
			if h.re.MatchString(b.Name) {
				main = main || i == 0
				continue next
			}
		}
		why := "the guest may write to it and no checkpoint holds it"
		for _, r := range refusedBlocks {
			if r.re.MatchString(b.Name) {
				why = r.why
				break
			}
		}
		bad = append(bad, fmt.Sprintf("RAM block %s (%d KiB): %s", b.Name, b.Used>>10, why))
	}
	if !main {
		bad = append(bad, "the guest's memory is not the RAM block "+RAMBlockID)
	}
	return bad
}

// QueryBlockedReasons returns why QEMU thinks that this guest cannot be
// migrated; empty means that nothing stands against it.
func (q *QMP) QueryBlockedReasons(ctx context.Context) ([]string, error) {
	var r struct {
		Reasons []string `json:"blocked-reasons"`
	}
	if err := q.query(ctx, "query-migrate", nil, &r); err != nil {
		return nil, err
	}
	return r.Reasons, nil
}

// Protectable returns, in one sentence each, why this running QEMU cannot be
// checkpointed: migration blockers and RAM blocks. None: it can. Saving device
// state checks neither by itself.
func (q *QMP) Protectable(ctx context.Context) ([]string, error) {
	why, err := q.QueryBlockedReasons(ctx)
	if err != nil {
		return nil, err
	}
	blocks, err := q.RAMBlocks(ctx)
	if err != nil {
		return nil, err
	}
	return append(why, CheckRAMBlocks(blocks)...), nil
}
