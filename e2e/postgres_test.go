//go:build soak

package e2e

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"perdure/internal/lab"
	"perdure/internal/lab/distro"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// connectPG opens one connection from the lab's client to the guest's PostgreSQL.
func (v *VM) connectPG() (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", distro.User, net.JoinHostPort(v.IP, strconv.Itoa(distro.Port)), distro.Database))
	if err != nil {
		return nil, err
	}
	dial := v.w.Lab.Dialer(lab.Client)
	cfg.DialFunc = func(ctx context.Context, _, addr string) (net.Conn, error) { return dial(ctx, addr) }
	ctx, cancel := context.WithTimeout(v.w.Ctx, 20*time.Second)
	defer cancel()
	return pgx.ConnectConfig(ctx, cfg)
}

// commits commits one transaction after the other over one connection, which
// must last as long as the guest does.
type commits struct {
	conn  *pgx.Conn
	acked atomic.Int64 // number of the last transaction whose commit was acknowledged
	quit  chan struct{}
	done  chan error
	worst time.Duration // longest transaction; to be read after the end
}

const (
	makeTables = `CREATE TABLE journal (id bigserial PRIMARY KEY, n bigint NOT NULL UNIQUE, pad text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
		CREATE TABLE balance (account int PRIMARY KEY, sum bigint NOT NULL);
		INSERT INTO balance SELECT a, 0 FROM generate_series(0, 99) a;`
	entry   = `INSERT INTO journal (n, pad) VALUES ($1, repeat(md5($1::bigint::text), 8))`
	booking = `UPDATE balance SET sum = sum + $1 WHERE account = $2`
)

// startCommits makes the tables and begins.
func (v *VM) startCommits() *commits {
	w := v.w
	w.T.Helper()
	var conn *pgx.Conn
	w.Eventually(10*time.Minute, "PostgreSQL answers", func() (err error) { conn, err = v.connectPG(); return err })
	_, err := conn.Exec(w.Ctx, makeTables)
	w.must(err, "make tables")
	c := &commits{conn: conn, quit: make(chan struct{}), done: make(chan error, 1)}
	go func() { c.done <- c.run(w.Ctx) }()
	return c
}

func (c *commits) run(ctx context.Context) error {
	for n := int64(1); ; n++ {
		select {
		case <-c.quit:
			return nil
		default:
		}
		start := time.Now()
		err := pgx.BeginFunc(ctx, c.conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, entry, n); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, booking, n, n%100)
			return err
		})
		if err != nil {
			return fmt.Errorf("transaction %d: %w", n, err)
		}
		c.acked.Store(n)
		c.worst = max(c.worst, time.Since(start))
	}
}

// flow waits until n more transactions were acknowledged.
func (c *commits) flow(w *World, n int64) {
	w.T.Helper()
	want := c.acked.Load() + n
	w.Eventually(3*time.Minute, fmt.Sprintf("%d more commits", n), func() error {
		select {
		case err := <-c.done:
			w.T.Fatalf("the client ended: %v", err)
		default:
		}
		if got := c.acked.Load(); got < want {
			return fmt.Errorf("%d of %d", got, want)
		}
		return nil
	})
}

// check ends the client and compares what is in the database with what was
// acknowledged, over the same connection.
func (c *commits) check(w *World) {
	w.T.Helper()
	close(c.quit)
	w.must(<-c.done, "client")
	c.compare(w, c.conn)
	w.T.Logf("%d commits acknowledged over one connection, all there and in order; the longest took %v", c.acked.Load(), c.worst.Round(time.Millisecond))
}

// compare reads all that was committed: nothing is missing, nothing out of
// order, nothing half done.
func (c *commits) compare(w *World, conn *pgx.Conn) { w.T.Helper(); c.compareUpTo(w, conn, 0) }

// compareUpTo is compare where so many commits may be there whose acknowledgement
// was lost with the connection.
func (c *commits) compareUpTo(w *World, conn *pgx.Conn, more int64) {
	w.T.Helper()
	acked := c.acked.Load()
	rows, err := conn.Query(w.Ctx, `SELECT n, pad = repeat(md5(n::text), 8) FROM journal ORDER BY id`)
	w.must(err, "read journal")
	var seen, n int64
	var whole bool
	_, err = pgx.ForEachRow(rows, []any{&n, &whole}, func() error {
		seen++
		if n != seen || !whole {
			return fmt.Errorf("line %d of the journal is transaction %d, content right: %v", seen, n, whole)
		}
		return nil
	})
	w.must(err, "read journal")
	if seen < acked || seen > acked+more {
		w.T.Errorf("%d commits were acknowledged, %d are there", acked, seen)
	}
	var sum int64
	w.must(conn.QueryRow(w.Ctx, `SELECT sum(sum)::bigint FROM balance`).Scan(&sum), "read balance")
	if want := seen * (seen + 1) / 2; sum != want {
		w.T.Errorf("the balance is %d, not %d", sum, want)
	}
}

// TestSoakPostgres takes the power of the primary's host, three times, under a
// PostgreSQL in a real distribution whose client commits without a break.
func TestSoakPostgres(t *testing.T) {
	img := distroImage(t)
	w := Start(t)
	w.long(40 * time.Minute)
	v := w.CreateDistro("ft", "--image", img.Disk)
	c := v.startCommits()
	g := v.Agent(2 * time.Minute)
	boot := g.Must(time.Minute, "cat /proc/sys/kernel/random/boot_id")
	v.Protected()
	for round := range 3 {
		c.flow(w, 100)
		primary := v.Primary()
		t.Logf("round %d: power off of %s after %d commits", round+1, primary, c.acked.Load())
		w.PowerOff(primary)
		c.flow(w, 20)
		v.Wait("state=running,primary="+w.Other(primary), 30*time.Second)
		c.flow(w, 30)
		w.PowerOn(primary)
		w.WaitCluster()
		v.Wait("state=running,mode=duplex", 5*time.Minute)
	}
	c.flow(w, 50)
	c.check(w)
	w.must(g.connect(), "guest agent after the takeovers")
	if got := g.Must(time.Minute, "cat /proc/sys/kernel/random/boot_id"); got != boot {
		t.Error("the guest was rebooted")
	}
	v.CheckConsole(v.Primary())
	g.Must(5*time.Minute, "/usr/lib/postgresql/15/bin/pg_amcheck -h 127.0.0.1 -U postgres --install-missing --heapallindexed --all")
	g.Must(2*time.Minute, "pg_ctlcluster 15 main stop")
	out := g.Must(5*time.Minute, "/usr/lib/postgresql/15/bin/pg_checksums --check -D /var/lib/postgresql/15/main")
	if !strings.Contains(out, "Bad checksums:  0") {
		t.Errorf("pg_checksums: %s", out)
	}
	if out := g.Must(time.Minute, "dmesg | grep -E 'I/O error|EXT4-fs (error|warning)' || true"); out != "" {
		t.Errorf("the guest's kernel complains:\n%s", out)
	}
	g.close()
	last := v.Primary()
	w.Perdure(last, "vm", "stop", v.Name)
	v.Wait("state=stopped", 3*time.Minute)
	v.CheckReplica(last)
	// The copy of the other host holds the same: it boots, and all is there.
	other := w.Other(last)
	w.Perdure(other, "vm", "start", v.Name, "--host", other)
	var conn *pgx.Conn
	w.Eventually(10*time.Minute, "PostgreSQL answers from the other host's disk", func() (err error) { conn, err = v.connectPG(); return err })
	c.compare(w, conn)
	v.Agent(2 * time.Minute).close()
	w.Perdure(other, "vm", "stop", v.Name)
	v.Wait("state=stopped", 3*time.Minute)
	v.CheckReplica(v.Show().Primary) // on a busy machine it may have moved since
}

// TestSoakPostgresDisk takes the disk of the host that runs a PostgreSQL at level ca
// away, under pgbench in the guest and a client outside that commits: nobody is
// told of an error. The disk is replaced; then the host is lost, and the guest boots
// on the other one with all that was committed.
func TestSoakPostgresDisk(t *testing.T) {
	img := distroImage(t)
	w := Start(t)
	w.long(40 * time.Minute)
	v := w.DefineDistro("ca", "--image", img.Disk)
	v.ownDiskOf("a", true, "6G")
	w.Perdure("a", "vm", "start", v.Name)
	c := v.startCommits()
	g := v.Agent(2 * time.Minute)
	boot := g.Must(time.Minute, "cat /proc/sys/kernel/random/boot_id")
	const pgbench = "su postgres -c '/usr/lib/postgresql/15/bin/pgbench "
	g.Must(5*time.Minute, "su postgres -c 'createdb bench' && "+pgbench+"-q -i -s 1 bench'")
	v.Wait("state=running,mode=duplex,primary=a", 10*time.Minute)
	// rate has pgbench work for some seconds, beside the client.
	rate := func(when string) {
		t.Helper()
		out := g.Must(5*time.Minute, pgbench+"-c 2 -T 20 bench 2>&1'")
		var tps, failed string
		for line := range strings.Lines(out) {
			line = strings.TrimSpace(line)
			if v, ok := strings.CutPrefix(line, "tps = "); ok {
				tps = v
			}
			if v, ok := strings.CutPrefix(line, "number of failed transactions: "); ok {
				failed = v
			}
		}
		t.Logf("pgbench %s: %s; failed %s", when, tps, failed)
		if tps == "" || !strings.HasPrefix(failed, "0 ") {
			t.Errorf("pgbench %s: %s", when, out)
		}
	}
	rate("with both disks")
	v.breakDisk("a")
	c.flow(w, 50)
	v.replica("a", model.Inconsistent, "disk-carried", true, time.Minute)
	rate("without the disk of its host")
	v.pullDisk("a")
	v.ownDiskOf("a", false, "6G")
	_, err := v.shimOp("a", shimapi.Op{Op: "disk-replace", Value: v.Show().Disks[0].ID})
	w.must(err, "replace the disk")
	rate("while the new disk is filled")
	v.replica("a", model.UpToDate, "disk-carried", false, 10*time.Minute)
	rate("with the new disk")
	if got := g.Must(time.Minute, "cat /proc/sys/kernel/random/boot_id"); got != boot {
		t.Error("the guest was rebooted")
	}
	if out := g.Must(time.Minute, "dmesg | grep -E 'I/O error|EXT4-fs (error|warning)' || true"); out != "" {
		t.Errorf("the guest's kernel complains:\n%s", out)
	}
	g.close()
	c.flow(w, 20)
	t.Logf("power off of a after %d commits", c.acked.Load())
	w.PowerOff("a")
	err = <-c.done // the guest boots: the connection is gone
	t.Logf("the client's connection ended: %v", err)
	v.Wait("state=running,primary=b", time.Minute)
	var conn *pgx.Conn
	w.Eventually(10*time.Minute, "PostgreSQL answers on the other host", func() (err error) { conn, err = v.connectPG(); return err })
	c.compareUpTo(w, conn, 1)
	t.Logf("%d commits acknowledged, all there; the longest took %v", c.acked.Load(), c.worst.Round(time.Millisecond))
	g = v.Agent(2 * time.Minute)
	g.Must(5*time.Minute, "/usr/lib/postgresql/15/bin/pg_amcheck -h 127.0.0.1 -U postgres --install-missing --heapallindexed --all")
	g.close()
	w.PowerOn("a")
	w.WaitCluster()
	v.Wait("state=running,mode=duplex", 10*time.Minute)
}
