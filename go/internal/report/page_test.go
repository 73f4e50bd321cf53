package report

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	cdpruntime "github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// audit returns what is wrong with the page: an axe in small. Colors are composed over what is behind them.
const audit = `(() => {
	const wrong = [];
	const rgba = s => { const n = s.match(/[\d.]+/g).map(Number); return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1]; };
	const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
	const luminance = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
	const behind = e => { let all = []; for (; e; e = e.parentElement) all.unshift(rgba(getComputedStyle(e).backgroundColor)); return all.reduce((under, top) => over(top, under), [255, 255, 255, 1]); };
	let texts = 0;
	const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
	for (let node; node = walker.nextNode();) {
		const e = node.parentElement;
		if (!node.data.trim() || !e.checkVisibility() || e.closest('svg')) continue;
		texts++;
		const under = behind(e), text = over(rgba(getComputedStyle(e).color), under);
		const [a, b] = [luminance(text), luminance(under)].sort((a, b) => b - a);
		const contrast = (a + 0.05) / (b + 0.05);
		if (contrast < 4.5) wrong.push('contrast ' + contrast.toFixed(2) + ': ' + node.data.trim().slice(0, 60));
	}
	if (texts < 50) wrong.push('only ' + texts + ' texts');
	let level = 0;
	for (const h of document.querySelectorAll('h1, h2, h3, h4, h5, h6')) {
		const l = Number(h.tagName[1]);
		if (l > level + 1) wrong.push('heading h' + l + ' after h' + level + ': ' + h.textContent);
		level = l;
	}
	if (document.querySelectorAll('h1').length !== 1) wrong.push('not one h1');
	for (const svg of document.querySelectorAll('svg')) {
		const title = svg.querySelector(':scope > title');
		if (!title || !title.textContent.trim() || !['img', 'group'].includes(svg.getAttribute('role'))) wrong.push('svg without title or role: ' + svg.outerHTML.slice(0, 200));
		const box = svg.getBoundingClientRect();
		if (!box.width || !box.height) wrong.push('svg without a size: ' + svg.outerHTML.slice(0, 200));
	}
	const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
	if (new Set(ids).size !== ids.length) wrong.push('an id twice');
	for (const a of document.querySelectorAll('a')) {
		const href = a.getAttribute('href');
		if (!href.startsWith('#') || !document.getElementById(href.slice(1))) wrong.push('link to nowhere: ' + href);
	}
	if (document.querySelector('script, iframe, object, embed, link, img, form')) wrong.push('an element that may not be there');
	for (const e of document.querySelectorAll('*')) for (const a of e.attributes) if (a.name.startsWith('on')) wrong.push('handler ' + a.name);
	const wide = document.documentElement.scrollWidth - window.innerWidth;
	if (wide > 0) wrong.push('overflows by ' + wide + ' px: ' + [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > window.innerWidth).map(e => e.outerHTML.slice(0, 80)).slice(0, 3));
	return wrong;
})()`

// browser is one tab of a headless Chromium.
type browser struct {
	ctx context.Context

	mu       sync.Mutex
	said     []string // on the console, and exceptions
	requests []string
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	oomtest.Slow(t)
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v: install it with: make test-parts, or apt-get install chromium", err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path),
		// Chromium refuses to run as root with its sandbox (crbug.com/638180), and make test needs root. The page is our own.
		chromedp.NoSandbox,
		// Nothing but the page may ask for anything.
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-gpu", true), chromedp.Flag("no-proxy-server", true),
		chromedp.UserDataDir(t.TempDir()))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	b := &browser{ctx: ctx}
	if err := chromedp.Listen(ctx, func(ev any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch ev := ev.(type) {
		case *network.EventRequestWillBeSent:
			b.requests = append(b.requests, ev.Request.URL)
		case *log.EventEntryAdded:
			b.said = append(b.said, ev.Entry.Text)
		case *cdpruntime.EventConsoleAPICalled:
			b.said = append(b.said, fmt.Sprint(ev.Type, ev.Args))
		case *cdpruntime.EventExceptionThrown:
			b.said = append(b.said, ev.ExceptionDetails.Text)
		}
	}); err != nil {
		t.Fatalf("start Chromium: %v", err)
	}
	_, err = chromedp.Call(ctx, network.Enable, network.EnableParams{})
	_, err2 := chromedp.Call(ctx, log.Enable, cdp.Empty{})
	_, err3 := chromedp.Call(ctx, cdpruntime.Enable, cdp.Empty{})
	if err := errors.Join(err, err2, err3); err != nil {
		t.Fatal(err)
	}
	return b
}

// open opens a file as a window of this width shows it, in a medium and a color scheme.
func (b *browser) open(t *testing.T, file string, width int64, media, scheme string) {
	t.Helper()
	_, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Media: media, Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := chromedp.Do(b.ctx, chromedp.EmulateViewport(width, 1200), chromedp.Navigate("file://"+file)); err != nil {
		t.Fatal(err)
	}
}

// look returns a screenshot of the window, and what audit finds. With OOM_TEST_SCREENSHOTS it leaves one of the whole page in that
// directory.
func (b *browser) look(t *testing.T) (shot []byte, wrong []string) {
	t.Helper()
	wrong, err := chromedp.Run(b.ctx, chromedp.Evaluate[[]string](audit))
	if err != nil {
		t.Fatal(err)
	}
	if shot, err = chromedp.Run(b.ctx, chromedp.CaptureScreenshot()); err != nil {
		t.Fatal(err)
	}
	if to := os.Getenv("OOM_TEST_SCREENSHOTS"); to != "" {
		whole, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, strings.ReplaceAll(t.Name(), "/", "-")+".png"), whole, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return shot, wrong
}

// colors counts the colors of an image, and how much of it is not of the most frequent one.
func colors(t *testing.T, data []byte, width int) (colors int, rest float64) {
	t.Helper()
	img, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	size := img.Bounds().Size()
	if size.X != width {
		t.Errorf("the screenshot is %d px wide, want %d", size.X, width)
	}
	seen := map[[3]uint32]int{}
	most := 0
	for y := 0; y < size.Y; y += 2 {
		for x := 0; x < size.X; x += 2 {
			r, g, b, _ := img.At(x, y).RGBA()
			c := [3]uint32{r, g, b}
			seen[c]++
			most = max(most, seen[c])
		}
	}
	return len(seen), 1 - float64(most)/float64((size.X+1)/2*((size.Y+1)/2))
}

// TestPage looks at reports in a real Chromium.
func TestPage(t *testing.T) {
	b := startBrowser(t)
	pages := map[string]string{
		"day":     day(t),
		"empty":   newFake(Options{}).write(t, Stream{}),
		"hostile": hostile(t, `</title></svg></style>"'><script>alert(1)</script><img src=x onerror=alert(2)><a href="javascript:alert(3)">x</a>`),
	}
	dir := t.TempDir()
	for name, html := range pages {
		file := filepath.Join(dir, name+".html")
		if err := os.WriteFile(file, []byte(html), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, scheme := range []string{"light", "dark"} {
			for _, width := range []int64{390, 1280} {
				t.Run(fmt.Sprintf("%s/%s/%d", name, scheme, width), func(t *testing.T) {
					b.open(t, file, width, "screen", scheme)
					shot, wrong := b.look(t)
					for _, w := range wrong {
						if name == "empty" && strings.HasPrefix(w, "only ") {
							continue
						}
						t.Error(w)
					}
					if n, rest := colors(t, shot, int(width)); n < 20 || rest < 0.02 {
						t.Errorf("%d colors, %.1f%% are not of the background", n, 100*rest)
					}
				})
			}
		}
	}
	// The page must not be able to ask for anything, even if something were injected.
	blocked, err := chromedp.Run(b.ctx, chromedp.Evaluate[bool](`fetch('data:text/plain,x').then(() => false, () => true)`, chromedp.EvalAwaitPromise))
	if err != nil || !blocked {
		t.Errorf("the content security policy lets a request pass: %v", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.requests {
		if !strings.HasPrefix(r, "file://"+dir+"/") && r != "data:text/plain,x" {
			t.Errorf("request to %s", r)
		}
	}
	if len(b.requests) < len(pages) {
		t.Errorf("only the requests %q were seen", b.requests)
	}
	for _, s := range b.said {
		if !strings.Contains(s, "data:text/plain,x") { // the attempt above
			t.Errorf("on the console: %s", s)
		}
	}
}

// TestPagePrints: on paper the report is black on white, whatever the scheme of the screen, and fits on A4.
func TestPagePrints(t *testing.T) {
	b := startBrowser(t)
	file := filepath.Join(t.TempDir(), "day.html")
	if err := os.WriteFile(file, []byte(day(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	b.open(t, file, 794, "print", "dark") // A4 at 96 dpi
	got, err := chromedp.Run(b.ctx, chromedp.Evaluate[string](`[getComputedStyle(document.querySelector('nav')).display, getComputedStyle(document.body).color,
		getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.watched')).fill].join(' ')`))
	if want := "none rgb(0, 0, 0) rgb(255, 255, 255) rgb(225, 239, 230)"; err != nil || got != want {
		t.Errorf("printed: %s, %v; want %s", got, err, want)
	}
	if _, wrong := b.look(t); len(wrong) > 0 {
		t.Errorf("printed: %s", wrong)
	}
}
