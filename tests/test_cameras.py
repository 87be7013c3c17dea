"""What cameras, recorders, NAS and UPS write, and what becomes of it: tables, the first of which grows by one entry a brand."""

from __future__ import annotations

import base64
import binascii
import json
import random
import re
import time
import tracemalloc
from typing import Any, NamedTuple

import pytest

import embedded_smtpd as emb
import server
from embedded_smtpd import Mail, camera_events, decode_text, decode_words, read_camera_mail

NOW = 1_790_000_000.0
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)) + b"\xff\xd9"
PNG = emb.test_card(1, NOW)
B64 = base64.encodebytes(JPEG).decode()


class Alert(NamedTuple):
    event: str
    camera: str
    picture: bytes | None
    said: dict[str, str]  # its meta


def alerts_of(content: bytes | str, *recipients: str, sender: str = "cam@lan", incomplete: bool = False) -> list[Alert]:
    """The alerts that a mail makes, each of which the relay takes."""
    data = content.encode() if isinstance(content, str) else content
    data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    mail = Mail(sender, list(recipients or ["alerts@localhost"]), data, incomplete=incomplete)
    read = read_camera_mail(mail.content_with_lf())
    pictures = [picture.decode(picture.raw()) for picture in read.pictures]
    alerts = []
    for event in camera_events(mail, read, NOW):
        assert isinstance(server.parse_line(json.dumps(event).encode(), b"", NOW), server.Event)
        alerts.append(Alert(event["event"], event["camera"], pictures[0] if pictures else None, event["meta"]))
    return alerts


def alert_of(content: bytes | str, *recipients: str, **options: Any) -> Alert:
    (alert,) = alerts_of(content, *recipients, **options)
    return alert


def written(text: str | bytes, subject: str = "Alarm", charset: str = "utf-8", encoding: str = "7bit", picture: bytes | None = JPEG) -> bytes:
    """An alarm mail as most recorders write it."""
    data = text.encode(charset or "utf-8") if isinstance(text, str) else text
    data = base64.encodebytes(data) if encoding == "base64" else data
    label = f"; charset={charset}" if charset else ""
    head = f"From: NVR <nvr@lan>\nTo: alerts@localhost\nSubject: {subject}\nMIME-Version: 1.0\n".encode()
    part = f"Content-Type: text/plain{label}\nContent-Transfer-Encoding: {encoding}\n\n".encode() + data
    if picture is None:
        return head + part + b"\n"
    attached = b'Content-Type: image/jpeg; name="a.jpg"\nContent-Transfer-Encoding: base64\n\n' + base64.encodebytes(picture)
    return head + b'Content-Type: multipart/mixed; boundary="=_b1"\n\n--=_b1\n%b\n--=_b1\n%b\n--=_b1--\n' % (part, attached)


# One entry a brand: its name, the Subject, the text, and the event and the camera that are right.
BRANDS = [
    ("Dahua recorder", "NVR", "Alarm Event: Motion Detection\nAlarm Input Channel No.: 2\nAlarm Device Name: NVR-6C39\n"
     "Alarm Start Time(D/M/Y H:M:S): 01/02/2026 03:04:05\nIP Address: 192.168.1.108\n", "MOTION_DETECTED", "NVR-6C39 2"),
    ("Dahua recorder, channel named", "x", "Alarm Event: Video Loss\nAlarm Input Channel No.: 2\nAlarm Input Channel Name: Tor 1\n"
     "Alarm Start Time (D/M/Y H:M:S): 12/11/2026 16:03:57\nAlarm Device Name: NVR\nAlarm Name:\nAlarm Details:\n", "CAMERA_DISCONNECTED", "Tor 1"),
    ("Dahua camera", "IPC Message", "Alarm Event: Tamper Detect\nAlarm Input Channel: 1\nAlarm Start Time(D/M/Y H:M:S): 06/05/2026 15:28:40\n"
     "Alarm Device Name: AMC00056\nAlarm Name:\nIP Address: 192.168.0.60\n", "TAMPER_DETECTED", "AMC00056 1"),
    ("Dahua EZIP", "x", "Alarm Event: Motion Detection Start\nAlarm Input Channel: 1\nAlarm Device Name: EZIP08\n", "MOTION_DETECTED", "EZIP08 1"),
    ("Dahua XVR, smart motion", "x", "Alarm Event: Smart Motion Human\nAlarm Input Channel No.: 3\nChannel Name: Depo Arka\n"
     "Alarm Device Name: XVR\n", "MOTION_DETECTED", "Depo Arka"),
    ("Dahua, Spanish", "NVR SEDE", "Evento de alarma: Cable trampa\nCanal de entrada de Alarma: 1\nFecha de Inicio de Alarma(D/M/Y H:M:S): 25/08/2026 07:05:05\n"
     "Nombre del dispositivo de alarma: Americas\nNombre alarma:\nDirección IP: 192.168.32.182\n", "MOTION_DETECTED", "Americas 1"),
    ("Dahua, Spanish, channel named", "x", "Evento de alarma: Pérdida de vídeo\nNombre: NVR_SEDE_001\nNombre de canal de entrada de alarma: Entrada-01\n",
     "CAMERA_DISCONNECTED", "Entrada-01"),
    ("Dahua DSS", "Activación Alarma punto.2026-08-26 09:30:04 UTC-05:00 External Alarm Device Name:Shop 7 Channel Name:BP_Shop 7_2", "Alerta\n",
     "MOTION_DETECTED", "BP_Shop 7_2"),
    ("Intelbras", "DVR PORTARIA", "Evento de alarme: Perda de vídeo\nAlarme no Canal No.: 11\nNome: CAM 11-LAZER\n"
     "Horário do inicio do alarme(D/M/A H:M:S): 01/09/2026 02:54:52\nNome do dispositivo de alarme: PORTARIA\n", "CAMERA_DISCONNECTED", "CAM 11-LAZER"),
    ("Hikvision recorder", "Embedded Net DVR: Motion Detected On Channel A2", "This is an automatically generated e-mail from your DVR.\n\n"
     "EVENT TYPE:    Motion Detected\nEVENT TIME:    2026-07-27,11:41:29\nDVR NAME:      Embedded Net DVR\nCAMERA NAME(NUM):   CAM 2 Garage(A2)\n",
     "MOTION_DETECTED", "CAM 2 Garage(A2)"),
    ("Hikvision recorder, tampering", "x", "EVENT TYPE:          Tampering Alarm\nDVR NAME:            Embedded Net DVR\nCHANNEL NAME:        Front door\n"
     "CHANNEL NUMBER:      A1\n", "TAMPER_DETECTED", "Front door"),
    ("Hikvision camera", "ORTO: on Camera1: Intrusion Detection", "EVENT TYPE: Intrusion Detection\nIPC NAME: ORTO\nCHANNEL NAME: Orto\nCHANNEL NUMBER: 1\n",
     "MOTION_DETECTED", "Orto"),
    ("Hikvision camera without a channel's name", "x", "EVENT TYPE: Video Signal Lost\nIPC NAME: Hof\nCHANNEL NUMBER: 01\n", "CAMERA_DISCONNECTED", "Hof 01"),
    ("Swann", "NVR8 Alert", "\n\nDevice Name: NVR8-0000RN\nEvent Type: Human and Vehicle\n\nChannel Name [IP-CH1]: Front Yard\nAlarmType: Human\n"
     "Alert from your NVR/DVR --- A Human and Vehicle event has been detected on one of your cameras\n", "MOTION_DETECTED", "Front Yard"),
    ("Reolink", "Reolink", "Alarm Camera Name:Living Room Camera, Alarm Event:Motion Detection, Alarm Input Channel No.:1, "
     "Alarm Device Name:Living Room Camera\n", "MOTION_DETECTED", "Living Room Camera"),
    ("Reolink, a line each", "x", "Alarm Camera Name: Garage\nAlarm Event: Person Detection\nAlarm Input Channel No.: 1\n", "MOTION_DETECTED", "Garage"),
    ("Reolink, its test", "Reolink", "If you receive this e-mail you have successfully set up and tested the e-mail alert from your IPC\n", "TEST", "alerts"),
    ("Foscam recorder", "NVR alarm", "This is a NVR alarm mail:FN0000XE channel:2 detected motion alarm at 2026-12-21 02:01:38 \n", "MOTION_DETECTED", "FN0000XE 2"),
    ("Foscam camera", "Camera alarm", "Motion detected at 2026-11-22 10:11:12. Your IPCamera:Hallway IP:192.168.1.30\n", "MOTION_DETECTED", "Hallway"),
    ("JVC", "Starting Alarm/Sensor REC!!", "HOST. vr716 [3rd factory]\nLIST DISPLAY 14/10/2026\nclock: 19:39:18\nMode: A\nCamCh: 4[ENTRANCE]\nThe End\n",
     "MOTION_DETECTED", "ENTRANCE"),
    ("Panasonic", "NV300 Status", "NV300 (192.168.0.250) Status notification\nStatus: CAM 12 VIDEO LOSS\n", "CAMERA_DISCONNECTED", "alerts"),
    ("motionEye", 'motionEye: motion detected by "Driveway"', 'Motion has been detected by camera "Driveway/meye" at 2026-11-23 19:04:35 (Europe/Paris).\n',
     "MOTION_DETECTED", "Driveway"),
    ("Dafang", "Alert !!", "This is an alert\n", "MOTION_DETECTED", "alerts"),
    ("APC UPS", "UPS: On battery power in response to an input power problem.", "Name     : UPS\nLocation : Rack\nCode     : 0x0109\n\n"
     "Warning - UPS: On battery power in response to an input power problem.\n", "MOTION_DETECTED", "UPS"),
    ("D-Link NAS", "dlink-000000_E-Mail_Alert", "A SMART Test Was Performed On The Following Hard Drive At 03:2:10 On 27-July-2026.\n\nDevice Model:  WDC\n\n"
     "The Result Of The Test Is: Pass\n", "MOTION_DETECTED", "alerts"),
    ("ESP8266 sketch", "Door opened", "Door contact open\n", "DOOR_OPENED", "alerts"),
    ("German labels", "x", "Alarmereignis: Videoverlust\nKanalname: Einfahrt Süd\n", "CAMERA_DISCONNECTED", "Einfahrt Süd"),
    ("French labels", "x", "Événement d’alarme : Perte de vidéo\nNom du canal : Entrée\n", "CAMERA_DISCONNECTED", "Entrée"),
    ("Italian labels", "x", "Evento di allarme: Manomissione video\nNome canale: Cortile\n", "TAMPER_DETECTED", "Cortile"),
    ("Russian labels", "x", "Событие тревоги: Потеря видео\n"
     "Имя канала: Ворота\n", "CAMERA_DISCONNECTED", "Ворота"),
    ("Chinese labels", "x", "报警事件：视频丢失\n通道名称：大门\n", "CAMERA_DISCONNECTED", "大门"),
]  # fmt: skip


@pytest.mark.parametrize("encoding", ["8bit", "base64"])
@pytest.mark.parametrize("brand", BRANDS, ids=[brand[0] for brand in BRANDS])
def test_mail_of_a_brand_is_understood(brand: tuple[str, str, str, str, str], encoding: str) -> None:
    _, subject, text, event, camera = brand
    alert = alert_of(written(text, subject, encoding=encoding))
    assert alert[:3] == (event, camera, JPEG)


# What happened


@pytest.mark.parametrize(
    "subject, event",
    [
        ("Motion detected", "MOTION_DETECTED"),
        ("Camera masked", "TAMPER_DETECTED"),
        ("Lens covered", "TAMPER_DETECTED"),
        ("Video Loss alarm", "CAMERA_DISCONNECTED"),
        ("Camera disconnected", "CAMERA_DISCONNECTED"),
        ("Net Disconnection", "CAMERA_DISCONNECTED"),
        ("Camera reconnected", "CAMERA_RECONNECTED"),
        ("Video signal recovered", "CAMERA_RECONNECTED"),
        ("Front door", "DOOR_OPENED"),
        ("System restart", "SYSTEM_RESTARTED"),
        ("E-mail test", "TEST"),
        ("Correo prueba", "TEST"),
        ("Testmail", "TEST"),
        ("测试邮件", "TEST"),
        ("Latest picture", "MOTION_DETECTED"),
        ("Storage Error", "MOTION_DETECTED"),
        ("Bus Stop", "MOTION_DETECTED"),
        ("South End: motion detected", "MOTION_DETECTED"),
        ("Motion detected at South End", "MOTION_DETECTED"),
        ("Vehicle Stop", "MOTION_DETECTED"),
        ("=?utf-8?q?Video_loss?=", "CAMERA_DISCONNECTED"),
    ],
)
def test_subject_says_what_happened_where_no_field_does(subject: str, event: str) -> None:
    assert alert_of(written("hello", subject)).event == event


WORDS_OF_EVENTS = {
    "TAMPER_DETECTED": ["Manipulación de vídeo", "Enmascaramiento", "Mascaramento de vídeo", "Sabotage", "Videomanipulation",
                        "Masquage vidéo", "Oscuramento video", "Manomissione", "Закрытие объектива",
                        "视频遮挡", "Cambio de escena", "Cambio scena"],
    "CAMERA_DISCONNECTED": ["Pérdida de vídeo", "Red desconectada", "Perda de sinal", "Videoverlust", "Netzwerk getrennt", "Perte vidéo",
                            "Perdita video", "Потеря видео", "网络断开", "视频丢失"],
    "CAMERA_RECONNECTED": ["Vídeo recuperado", "Video wiederhergestellt", "Reconnexion", "视频恢复"],
    "DOOR_OPENED": ["Puerta abierta", "Porta aberta", "Tür geöffnet", "Porte ouverte", "Дверь открыта", "门被打开"],
    "SYSTEM_RESTARTED": ["Reinicio del sistema", "Reinício", "Neustart", "Redémarrage", "Riavvio", "Перезагрузка", "设备重启"],
    "TEST": ["Correo de prueba", "E-mail de teste", "Testnachricht", "E-mail d’essai", "Email di prova", "Тестовое письмо", "测试"],
    "MOTION_DETECTED": ["Detección de movimiento", "Detecção de movimento", "Bewegungserkennung", "Détection de mouvement",
                        "Rilevamento movimento", "Обнаружение движения", "移动侦测", "Intrusión", "IP Conflict"],
}  # fmt: skip


@pytest.mark.parametrize("event, words", [(event, words) for event, all_words in WORDS_OF_EVENTS.items() for words in all_words])
def test_word_of_a_recorder_in_its_language_is_known(event: str, words: str) -> None:
    for text, subject in ((f"Alarm Event: {words}\n", "x"), ("x", words), (f"Alarm Event: {words.upper()}\n", "x")):
        assert alert_of(written(text, subject)).event == event


@pytest.mark.parametrize(
    "text, subject, recipient, event",
    [
        ("Channel Name: Front door\n", "Front door: Motion detected", "alerts", "MOTION_DETECTED"),
        ("Channel Name: Front door\n", "Front door opened", "alerts", "DOOR_OPENED"),
        ("Channel Name: Bus Stop\nAlarm Event: Motion Detection\n", "Bus Stop", "alerts", "MOTION_DETECTED"),
        ("x", "Alarm: Motion Detection Stop", "alerts+Motion Detection Stop@lan", "MOTION_DETECTED"),
        ("x", "Offline test camera", "alerts+offline test camera@lan", "MOTION_DETECTED"),
        ("Alarm Event: Door opened\n", "Video loss", "alerts", "DOOR_OPENED"),
        ("Alarm Event: Something new\n", "Video loss", "alerts", "MOTION_DETECTED"),
        ("Please test e-mail settings\n", "Video loss", "alerts", "CAMERA_DISCONNECTED"),
        ("x", "Camera masked", "a", "TAMPER_DETECTED"),
        ("Channel Name: 大门\n", "大门开门", "alerts", "DOOR_OPENED"),
    ],
)
def test_event_is_in_the_field_else_in_the_subject_without_the_name_of_the_camera(text: str, subject: str, recipient: str, event: str) -> None:
    assert alert_of(written(text, subject), recipient).event == event


@pytest.mark.parametrize(
    "text, subject",
    [
        ("Alarm Event: Motion Detection Stop\n", "x"),
        ("Alarm Event: Motion Detection (end)\nChannel Name: Bus\n", "x"),
        ("Alarm Event: Motion Detection\nAlarm Stop Time(D/M/Y H:M:S): 01/02/2026 03:04:05\n", "x"),
        ("Evento de alarma: Tripwire fin\n", "x"),
        ("Evento de alarma: Detec. Moción Fin\n", "x"),
        ("Evento de alarma: DIM (humanos) fin\n", "x"),
        ("Evento de alarme: Movimento\nHorário de término do alarme(D/M/A H:M:S): 01/09/2026 02:54:52\n", "x"),
        ("Alarmereignis: Bewegungserkennung beendet\n", "x"),
        ("报警事件: 移动侦测结束\n", "x"),
        ("hello", "Motion Detection Stop"),
        ("hello", "End of alarm"),
        ("Channel Name: Bus Stop\n", "Bus Stop: Motion Detection ended"),
    ],
)
def test_alarm_that_ended_is_no_event(text: str, subject: str) -> None:
    assert alerts_of(written(text, subject)) == []


@pytest.mark.parametrize(
    "text",
    [
        "Alarm Event: Bus Stop\n",
        "Alarm Event: Motion Detection at South End\n",
        "Alarm Event: Motion Detection\nChannel Name: Motion Detection Stop\n",
        "Alarm Event: Tripwire\nAlarm Start Time: 1\nAlarm End Time: 2\n",
        "Alarm Event: Intrusion\nThe End\n",
    ],
)
def test_where_in_doubt_it_is_an_alarm(text: str) -> None:
    assert alert_of(written(text)).event == "MOTION_DETECTED"


# Where


@pytest.mark.parametrize(
    "text, recipients, cameras",
    [
        ("Channel Name: Yard\n", ["alerts+north gate@localhost"], ["north gate"]),
        ("Channel Name: Yard\n", ["garage@lan"], ["Yard"]),
        ("x", ["garage"], ["garage"]),
        ("x", ["alerts+@x.org"], ["alerts"]),
        ("x", ["+yard@x.org"], ["yard"]),
        ("x", ["@"], ["camera"]),
        ("x", [""], ["camera"]),
        ("x", ["owner@localhost", "alerts+garage@localhost"], ["garage"]),
        ("Channel Name: Yard\n", ["a+one@x", "a+two@x", "a+one@x"], ["one", "two"]),
        ("x", ["first@x", "second@x"], ["first"]),
        ("Alarm Input Channel Name: \u200b\nChannel Name: Yard\n", ["a"], ["Yard"]),
        ("Channel Name: \u200d \u2060\nDVR NAME: Shed\nChannel Number: 2\n", ["a"], ["Shed 2"]),
        ("Channel Name: " + "\u200c" * 200 + "Tor\nDVR NAME: Shed\n", ["a"], ["Shed"]),
        ("Channel Name: \u3164\u2800\u00ad\U000e0041\nDVR NAME: Shed\n", ["a"], ["Shed"]),
        ("Channel Name: در\n", ["a"], ["در"]),
        ("Channel Name: Tor\x00\x1b[2J\u202e\n", ["a"], ["Tor [2J"]),
        ("channel name：大门：东\n", ["a"], ["大门：东"]),
    ],
)
def test_camera_is_the_detail_of_the_address_else_its_name_in_the_text_else_the_recipient(
    text: str, recipients: list[str], cameras: list[str]
) -> None:
    assert [alert.camera for alert in alerts_of(written(text), *recipients)] == cameras


def test_mail_to_a_thousand_cameras_is_a_few_alerts() -> None:
    assert len(alerts_of(written("x"), *(f"a+{number}@x" for number in range(1000)))) == emb.CAMERAS_MOST


# MIME as it is written. Each entry is a whole mail; all tell of a lost camera `yard`, and but for the last ones show it.

TEXT = "Alarm Event: Video Loss\nChannel Name: yard\n"
PART = f"Content-Type: text/plain\n\n{TEXT}"
IMAGE = f"Content-Type: image/jpeg\nContent-Transfer-Encoding: base64\n\n{B64}"
USUAL = written(TEXT).decode()
MIXED = 'Subject: Alarm\nContent-Type: multipart/mixed; boundary="=_b"\n\n'
LINES = B64.splitlines()


def mixed(*parts: str, head: str = MIXED, boundary: str = "=_b") -> str:
    return head + "".join(f"--{boundary}\n{part}\n" for part in parts) + f"--{boundary}--\n"


def uuencoded(end: str = "`\nend\n") -> str:
    lines = (binascii.b2a_uu(JPEG[at : at + 45]).decode() for at in range(0, len(JPEG), 45))
    return "begin 644 /img/shot 1.jpg\n" + "".join(lines) + end


HTML = "Content-Type: text/html\n\n"
INNER_EML = base64.encodebytes(USUAL.encode()).decode()
WRITTEN = {
    "as it should be": USUAL,
    "padding missing": USUAL.replace(B64, B64.rstrip("=\n") + "\n"),
    "chunks padded each": USUAL.replace(B64, "\n".join(base64.b64encode(JPEG[at : at + 55]).decode() for at in range(0, len(JPEG), 55))),
    "all Base64 in one line": USUAL.replace(B64, B64.replace("\n", "") + "\n"),
    "blank lines in the Base64": USUAL.replace(B64, B64.replace("\n", "\n\n")),
    "junk in the Base64": USUAL.replace(B64, B64.replace("\n", "!\n")),
    "text below the Base64": USUAL.replace(B64, B64 + "\nScanned by somebody, nothing was found.\n"),
    "Base64 unlabelled": USUAL.replace("Transfer-Encoding: base64", "Something: base64"),
    "Base64 as 8bit": USUAL.replace("Encoding: base64", "Encoding: 8bit"),
    "Base64 as quoted-printable": USUAL.replace("Encoding: base64", "Encoding: quoted-printable"),
    "an unknown encoding": USUAL.replace("Encoding: base64", "Encoding: x-evil"),
    "blanks behind the encoding": USUAL.replace("Encoding: base64", "Encoding: BASE64 ;  "),
    "text in Base64": written(TEXT, encoding="base64").decode(),
    "text in Base64, unlabelled": written(TEXT, encoding="base64").decode().replace("Transfer-Encoding: base64\n\nQ", "Foo: base64\n\nQ"),
    "text in Base64, text below it": written(TEXT, encoding="base64").decode().replace("\n\n--=_b1\n", "\n-- \nsent by: me\n--=_b1\n"),
    "text says Base64 and is none": USUAL.replace("Encoding: 7bit", "Encoding: base64"),
    "text in quoted-printable": USUAL.replace("Encoding: 7bit", "Encoding: quoted-printable").replace("Channel Name", "Ch=61nnel=20Na=\nme"),
    "uuencode in the text": f"Subject: Alarm\n\n{TEXT}{uuencoded()}",
    "uuencode without an end": f"Subject: Alarm\n\n{TEXT}{uuencoded('')}",
    "uuencode as a part": mixed(PART, f"Content-Type: image/jpeg\nContent-Transfer-Encoding: x-uuencode\n\n{uuencoded()}"),
    "uuencode with blanks cut off": f"Subject: Alarm\n\n{TEXT}" + re.sub(" +\n", "\n", uuencoded().replace("`", " ")),
    "boundary too long": USUAL.replace("=_b1", "=_" + "x y" * 50),
    "boundary with a slash": USUAL.replace("=_b1", "ZZ_/afg6432dfgkl.94531q"),
    "boundary unquoted": USUAL.replace('"=_b1"', "=_b1"),
    "boundary unquoted with a parameter": USUAL.replace('"=_b1"', "=_b1; charset=utf-8"),
    "boundary half quoted": USUAL.replace('"=_b1"', '"=_b1'),
    "boundary quoted at the end": USUAL.replace('"=_b1"', '=_b1"'),
    "boundary folded": USUAL.replace("; boundary", ";\n\tboundary"),
    "boundary on an unindented line": USUAL.replace("; boundary", ";\nboundary"),
    "boundary in capitals": USUAL.replace("boundary=", "BOUNDARY = "),
    "boundary in Latin capitals": USUAL.replace("Content-Type: multipart", "CONTENT-TYPE: MULTIPART"),
    "boundary of asterisks": USUAL.replace('"=_b1"', "*****MAIL_BOUNDARY*****").replace("=_b1", "*****MAIL_BOUNDARY*****"),
    "boundary that ends with hyphens": USUAL.replace("=_b1", "=_b1--"),
    "boundary another than announced": USUAL.replace('"=_b1"', '"=_b2"'),
    "boundary not announced": USUAL.replace('; boundary="=_b1"', ""),
    "no header of a multipart": USUAL.replace('Content-Type: multipart/mixed; boundary="=_b1"\n', ""),
    "no last delimiter": USUAL.replace("--=_b1--\n", ""),
    "no first header line": mixed(TEXT, IMAGE),
    "no blank line below the header": USUAL.replace('"\n\n--=_b1', '"\n--=_b1'),
    "no blank line in a part": USUAL.replace("7bit\n\n", "7bit\n"),
    "no blank line below the Subject": "Subject: Alarm\n" + TEXT.replace("Channel Name", "Channel name") + "\n" + B64,
    "fields that look like headers": mixed("Event: Video Loss\nCamera: yard\n", IMAGE),
    "blank line above the header": "\n" + USUAL,
    "blank line above a part": USUAL.replace("--=_b1\nContent", "--=_b1\n\nContent"),
    "gap in the header": USUAL.replace("MIME-Version", "\n\nMIME-Version"),
    "a gap below each header": USUAL.replace("\nTo: ", "\n\nTo: ").replace("\nSubject", "\n\nSubject").replace("\nMIME", "\n\nMIME").replace("\nContent", "\n\nContent"),
    "gap, and all in one part": f"Subject: Alarm\n\nContent-Type: text/plain\nContent-Transfer-Encoding: base64\n\n{base64.encodebytes(TEXT.encode()).decode()}\n\n{B64}",
    "a Subject that goes on unindented": USUAL.replace("Subject: Alarm", "Subject: Alarm in\nthe house"),
    "a line of mbox above": "From nvr@lan Thu Dec  1 03:04:05 2026\n" + USUAL,
    "byte order mark": "\ufeff" + USUAL,
    "byte order mark in the text": USUAL.replace("Alarm Event", "\ufeffAlarm Event"),
    "NUL": USUAL.replace("yard\n", "yard\0\n"),
    "more parts than count": mixed(PART, *[IMAGE] * 120),
    "blank first parts": mixed("Content-Type: text/plain\n\n \n\n", "Content-Type: text/plain\n\n\n", PART, IMAGE),
    "an empty picture first": mixed(PART, "Content-Type: image/jpeg\n\n\n", IMAGE),
    "picture first": mixed(IMAGE, PART),
    "picture labelled as text": mixed(PART, IMAGE.replace("image/jpeg", "text/plain")),
    "picture labelled as a slash": mixed(PART, IMAGE.replace("image/jpeg", "/")),
    "picture without a label": mixed(PART, IMAGE.replace("Content-Type: image/jpeg\n", "")),
    "nested multiparts": mixed(mixed(PART, head='Content-Type: multipart/alternative; boundary="in"\n\n', boundary="in"), IMAGE),
    "nested multiparts of one boundary": mixed(mixed(PART, head='Content-Type: multipart/alternative; boundary="=_b"\n\n'), IMAGE),
    "attached as a mail": mixed("Content-Type: message/rfc822\n\n" + USUAL),
    "attached as a mail, encoded": mixed(f"Content-Type: message/rfc822\nContent-Transfer-Encoding: base64\n\n{INNER_EML}"),
    "attached as a file .eml": mixed(f'Content-Type: application/octet-stream; name="a.eml"\nContent-Transfer-Encoding: base64\n\n{INNER_EML}'),
    "HTML alone": mixed(HTML + "<style>p{color:red}</style><p><b>Alarm Event:</b> Video Loss</p><p><b>Channel Name:</b> yard</p>", IMAGE),
    "HTML table": mixed(HTML + "<table><tr><td>Alarm Event:</td><td>Video Loss</td></tr><tr><td>Channel Name:</td>\n<td>yard</td></tr></table>", IMAGE),
    "HTML in elements of their own": mixed(HTML + "<div>Alarm Event:</div><div>Video&nbsp;Loss</div><div>Channel Name:</div><div>yard</div>", IMAGE),
    "HTML labelled as text": mixed("Content-Type: text/plain\n\n<html><p>Alarm Event: Video Loss</p><p>Channel Name: yard", IMAGE),
    "HTML beside a blank text": mixed("Content-Type: text/plain\n\n \n", HTML + "Alarm Event: Video Loss<br>Channel Name: yard", IMAGE),
    "HTML beside a text that says nothing": mixed("Content-Type: text/plain\n\nThis mail is HTML.\n", HTML + "Alarm Event: Video Loss<br/>Channel Name: yard", IMAGE),
    "HTML that names the character set itself": mixed("Content-Type: text/html\n\n<meta charset=utf-8>Alarm Event: Video Loss<br>Channel Name: yard", IMAGE),
    "picture in the source of HTML": f"Subject: Alarm\n{HTML}Alarm Event: Video Loss<br>Channel Name: yard<br><img src='data:image/jpeg;base64,{B64}'>bye, bye",
    "no header at all": f"--=_b\n{PART}\n--=_b\n{IMAGE}\n--=_b--\n",
    "a signature's hyphens": USUAL.replace(TEXT, TEXT + "-- \nNVR\n"),
    "an epilogue": USUAL + "-- End --\n",
}  # fmt: skip


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n", b"\r\r\n", b"\r"], ids=["CR LF", "LF", "CR CR LF", "CR"])
@pytest.mark.parametrize("form", WRITTEN)
def test_alarm_is_read_however_it_is_written(form: str, line_end: bytes) -> None:
    content = WRITTEN[form].encode().replace(b"\n", line_end)
    read = read_camera_mail(Mail("", ["alerts"], content).content_with_lf())
    (event,) = camera_events(Mail("", ["alerts"], content), read, NOW)
    assert (event["event"], event["camera"]) == ("CAMERA_DISCONNECTED", "yard")
    assert read.pictures[0].decode(read.pictures[0].raw()) == JPEG


@pytest.mark.parametrize(
    "content",
    ["", "\n", "no headers at all", "Content-Type: multipart/mixed\n\nx", "Subject: a\x01b\nSubject: c\n\n", "--b\n", "--b--\n",
     "Subject: =?x-evil?q?Alarm?=\nDate: =?utf-8?b?Q?=\n\n", "Content-Type: multipart/mixed; boundary=\n\n--\nx\n----\n", ":\n:\n", "\n--\n--\n"],
)  # fmt: skip
def test_odd_mail_is_still_an_alert(content: str) -> None:
    assert alert_of(content)[:2] == ("MOTION_DETECTED", "alerts")


def test_what_is_not_understood_arrives_with_its_subject_text_and_files() -> None:
    clip = 'Content-Type: video/mp4; name="C:\\\\clips\\\\a.mp4"\nContent-Transfer-Encoding: base64\n\nAAAA\n'
    alert = alert_of(mixed("Content-Type: text/plain\n\nDear User,\nzone 3: glass\nbroken at 12:11.\n", clip, "Content-Type: audio/x\n\nxx"))
    assert alert.said["text"] == "Dear User, / broken at 12:11." and alert.said["zone 3"] == "glass"
    assert alert.said["subject"] == "Alarm" and alert.said["attached"] == "a.mp4, audio/x"


@pytest.mark.parametrize(
    "parameters, name",
    [
        ('; name="a.jpg"', "a.jpg"),
        ("; name=a.jpg; x=y", "a.jpg"),
        ("; name=a.jpg; name=b.jpg", "a.jpg"),
        ('; name="../../a.jpg', "a.jpg"),
        ('; name="=?utf-8?B?RWluZmFocnQtU8O8ZC5qcGc=?="', "Einfahrt-Süd.jpg"),
        ("; name==?utf-8?Q?a=2Ejpg?=", "a.jpg"),
        ("; name*=utf-8''%E4%B8%AD.jpg", "中.jpg"),
        ("; name*=x-nonsense''a%2Ejpg", "a.jpg"),
        ('; name*0="a."; name*1="jpg"', "a.jpg"),
        ("; name*=%E4.jpg", None),
        ("; name*=a.jpg; name*0*=b", None),
        ("; name*0*=; name*0*=", None),
        ('; name="Süd.jpg"', "Süd.jpg"),
    ],
)
def test_file_name_in_whatever_form_costs_no_picture(parameters: str, name: str | None) -> None:
    for head in (f"Content-Type: image/jpeg{parameters}", f"Content-Disposition: attachment{parameters.replace('name', 'filename')}"):
        read = read_camera_mail(mixed(PART, IMAGE.replace("Content-Type: image/jpeg", head)).encode())
        assert [picture.decode(picture.raw()) for picture in read.pictures] == [JPEG]
        assert name is None or read.pictures[0].filename == name


def test_of_several_pictures_the_first_is_shown_and_the_others_are_counted() -> None:
    png = f"Content-Type: x/y\nContent-Transfer-Encoding: base64\n\n{base64.encodebytes(PNG).decode()}"
    alert = alert_of(mixed(PART, "Content-Type: image/jpeg\n\nnot a picture", png, IMAGE))
    assert alert.picture == PNG and alert.said["pictures"] == "2, the first is shown"


# Character sets


@pytest.mark.parametrize(
    "label, codec, name",
    [
        ("gb2312", "gbk", "大門 彷嗎镕"),
        ("GBK", "gb18030", "大门"),
        ("x-gbk", "gbk", "大门"),
        ("Shift_JIS", "cp932", "玄関①"),
        ("x-sjis", "cp932", "玄関"),
        ("euc-jp", "euc_jis_2004", "玄関①"),
        ("iso-2022-jp", "iso2022_jp", "玄関"),
        ("ks_c_5601-1987", "cp949", "랠쪼 창고 퓉"),
        ("Big5", "cp950", "前門碌粧"),
        ("x-x-big5", "big5", "後門"),
        ("iso-8859-8-i", "iso8859-8", "שער"),
        ("windows-874", "cp874", "ประต\u0e39"),
        ("tis-620", "cp874", "ประต\u0e39"),
        ("windows-1251", "cp1251", "Ворота"),
        ("koi8-r", "koi8-r", "Ворота"),
        ("windows-1256", "cp1256", "باب"),
        ("iso-8859-1", "cp1252", "Tor „Süd“"),
        ("iso-8859-9", "cp1254", "Giriş \u20ac"),
        ("utf-16", "utf-16", "大门"),
        ("unicode", "utf-16-le", "大门"),
        ("UTF8", "utf-8", "大门"),
        ("us-ascii", "utf-8", "大门"),
        ("iso-8859-1", "utf-8", "大门"),
        ("us-ascii", "gbk", "大门"),
        ("utf-8", "cp1252", "Einfahrt Süd"),
        ("utf-8", "gbk", "大门"),
        ("windows-31j", "cp932", "玄関①"),
        ("ksc_5601", "cp949", "창고"),
        ("macintosh", "mac-roman", "Süd"),
        ("", "utf-8", "Süd"),
        ("", "cp1252", "Einfahrt Süd"),
        ("", "cp1252", "Detecção"),
        ("", "gb18030", "前门摄像机"),
        ("", "cp1251", "Ворота"),
        ("", "cp1251", "КАМЕРА 3 вход"),
        ("x-nonsense", "gbk", "大门"),
    ],
)
def test_name_in_any_character_set_is_read(label: str, codec: str, name: str) -> None:
    encoding = "base64" if "16" in codec else "8bit"
    alert = alert_of(written(f"Alarm Event: Motion\nChannel Name: {name}\n".encode(codec), charset=label, encoding=encoding))
    assert alert.camera == name
    assert decode_text(name.encode(codec), label) == name or not label


def test_letters_of_nec_in_iso_2022_jp_are_read() -> None:
    assert decode_text(b"\x1b$BF0BN8!CN-!\x1b(B", "ISO-2022-JP") == "動体検知①"


def test_name_that_is_cut_in_the_middle_of_a_character_loses_only_that() -> None:
    assert decode_text("前门摄像机".encode()[:-1], "utf-8") == "前门摄像"


@pytest.mark.parametrize("label", ["punycode", "punycode-", "idna", "rot13", "uu", "zip", "bz2", "hex", "unicode_escape", "raw-unicode-escape", "undefined", "mbcs", "oem", "x" * 5000])
def test_codecs_that_are_no_character_sets_are_not_used(label: str) -> None:
    assert emb.LABELS.get(emb.plain_label(label)) is None
    assert decode_text(b"a-\\u0041 " * 30_000, label) == "a-\\u0041 " * 30_000


@pytest.mark.parametrize(
    "subject, charset, shown",
    [
        ("Тревога: движение".encode("cp1251"), "windows-1251", None),
        ("Тревога: движение".encode("cp1251"), "", None),
        ("前门: Motion Detected On Camera1".encode("gb18030"), "gb2312", None),
        ("Bewegung Einfahrt Süd".encode("latin-1"), "", None),
        ("Bewegung Einfahrt Süd".encode(), "iso-8859-1", None),
        (b"=?UTF-8?Q?Motion detected: Einfahrt S=C3=BCd, Geh=\n =C3=B6ft?=", "utf-8", "Motion detected: Einfahrt Süd, Gehöft"),
        (b"=?UTF-8?B?Motion on cam 4?=", "utf-8", "Motion on cam 4"),
        (b"=?utf-8?B?TW90aW9uIFPDvA?= x", "utf-8", "Motion Sü x"),
        (b"=?gb2312?B?" + base64.b64encode("移动 镕".encode("gbk")) + b"?=", "utf-8", "移动 镕"),
        (b"=?utf-8?B?U8M=?=\n =?utf-8?B?vGQ=?=", "utf-8", "Süd"),
        (b"=?utf-8?q?a?= =?utf-8?q?b?= c =?iso-8859-1?q?=FC?==?utf-8?q?!?=", "utf-8", "ab c ü!"),
        (b"=?punycode?q?Motion?=", "utf-8", "Motion"),
    ],
)
def test_subject_is_read_in_whatever_form(subject: bytes, charset: str, shown: str | None) -> None:
    content = written("x").replace(b"Alarm", subject, 1).replace(b"charset=utf-8", b"charset=" + charset.encode() if charset else b"x=y")
    expected = shown or subject.decode(charset or ("cp1251" if subject[0] == 0xD2 else "latin-1")) if not subject.startswith(b"Bewegung Einfahrt S\xc3") else subject.decode()
    assert alert_of(content).said["subject"] == expected


# What is said in the alert


def test_meta_holds_in_the_order_of_the_mail_what_is_not_said_already() -> None:
    text = "Alarm Event: Motion Detection\nSent by: nvr@lan\nChannel Name: yard\nIP Address: 192.168.1.108\n" + "a: b\n" * 3
    now = "Mon, 21 Sep 2026 14:13:00 +0000"
    alert = alert_of(written(text, "Motion Detection").replace(b"Subject", f"Date: {now}\nSubject".encode()))
    assert list(alert.said.items()) == [
        ("alarm event", "Motion Detection"), ("sent by", "nvr@lan"), ("ip address", "192.168.1.108"), ("a", "b")
    ]  # fmt: skip
    other = alert_of(written(text, "NVR 1").replace(b"Subject", b"Date: Mon, 2 Mar 2026 10:00:00 +0100\nSubject"))
    assert other.said["subject"] == "NVR 1" and other.said["date"] == "Mon, 2 Mar 2026 10:00:00 +0100"


def test_what_the_mail_said_is_kept_in_bounds() -> None:
    text = "".join(f"Line {number}: {'v' * 1000}\n" for number in range(100)) + "free text\n" * 1000
    alert = alert_of("From: A <a@b>\n" + written(text, "S").decode().partition("\n")[2])
    assert len(alert.said) == 32 and alert.said["from"] == "a@b" and alert.said["subject"] == "S"
    assert max(len(value) for name, value in alert.said.items() if name != "text") <= 300
    assert len(alert.said["text"]) <= emb.TEXT_SHOWN


def test_line_of_the_text_is_split_after_its_whole_name() -> None:
    said = alert_of(written("Alarm Start Time(D/M/Y H:M:S): 01/02/2026 03:04:05\nOdd (name: 1\nhttp://x/y\n")).said
    assert said["alarm start time(d/m/y h:m:s)"] == "01/02/2026 03:04:05" and said["odd (name"] == "1"
    assert "http" not in said


@pytest.mark.parametrize(
    "line",
    ["Alarm Event: Video Loss, Time: 2026-11-22 12:11:10, Channel Name: yard, Zone: 3", "Channel Name:yard;Zone:3;Time:2026-11-22 12:11:10;Event Type:Video Loss",
     "[cam] Event Type : Video Loss | Channel Name [IP-CH1] : yard | zone： 3 | Time : 2026-11-22 12:11:10", "EVENT TYPE: Video Loss   CHANNEL NAME: yard , zone: 3, time: 2026-11-22 12:11:10"],
)  # fmt: skip
def test_one_line_with_several_fields_is_taken_apart(line: str) -> None:
    alert = alert_of(written(line))
    assert alert[:2] == ("CAMERA_DISCONNECTED", "yard")
    assert alert.said["zone"] == "3" and alert.said["time"] == "2026-11-22 12:11:10"


def test_mail_whose_end_never_came_says_so() -> None:
    assert alert_of(written("x"), incomplete=True).said["incomplete"]


@pytest.mark.parametrize(
    "headers, ours",
    [
        ("X-Alert-Id: 1\n", True),
        ("Auto-Submitted: auto-generated\nSubject: DVR ALERT: 3 alerts - MOTION_DETECTED - cam1\n", True),
        ("Auto-Submitted: auto-generated\nSubject: DVR summary: 2026-09-21 - 3 alerts\n", True),
        ("Auto-Submitted: auto-generated\nSubject: Motion detected\n", False),
        ("Auto-Submitted: no\nSubject: DVR ALERT: Motion\n", False),
        ("Subject: DVR ALERT\n", False),
    ],
)
def test_mail_of_an_alert_relay_is_known_and_automatic_mail_of_a_camera_is_none(headers: str, ours: bool) -> None:
    bounce = f"Subject: Undelivered\nContent-Type: multipart/report; boundary=b\n\n--b\nContent-Type: message/rfc822\n\n{headers}\nx\n--b--\n"
    for content in (headers + "\nhello\n", bounce):
        assert read_camera_mail(content.encode()).from_a_relay is ours


# Bounds


@pytest.mark.parametrize("kind", ["plain", "html"])
@pytest.mark.parametrize(
    "filler",
    [" ", "<", "a:", "(", "()", "a:\n", "channel name (", "alarm event: ", "<p>", "<style>", "&#" + "9" * 5000 + ";", "\u0660:", "begin 644 ",
     "\nbegin 644 x\n!\n", "=?utf-8?q?", "[x]:", "\n--x\nContent-Type: x\n"],
)  # fmt: skip
def test_text_that_is_costly_to_read_is_an_alert_within_a_second(filler: str, kind: str) -> None:
    content = f"Subject: Front door\nContent-Type: text/{kind}\n\n{filler * (2_000_000 // len(filler))}\nAlarm Start: now\n"
    began = time.process_time()
    assert alert_of(content).event == "DOOR_OPENED"
    assert time.process_time() - began < 1


HEAD = b"Subject: Front door\nContent-Type: multipart/mixed; boundary=b\n\n"
COSTLY = {
    "headers": b"Subject: Front door\n" + b"A: b\n" * 400_000,
    "header lines that are none": b"Subject: Front door\n" + b"junk\n" * 400_000 + b"To: x\n",
    "parts": HEAD + b"--b\n" * 500_000,
    "parts that end": HEAD + b"--b--\n" * 500_000,
    "parts with headers": HEAD + (b"--b\n" + b"A: b\n" * 900 + b"\n") * 400,
    "parts with gaps": HEAD + (b"--b\n" + b"A: b\n\n\n" * 900) * 400,
    "delimiters of no part": HEAD + b"--\n" * 600_000,
    "delimiters of many parts": HEAD + b"".join(b"--%d\nContent-Type: x\n\n" % number for number in range(100_000)),
    "boundaries": b"Subject: Front door\n\n" + b"boundary=x\n" * 200_000,
    "mails in mails": b"Subject: Front door\n" + b"Content-Type: message/rfc822\n\n" * 80_000,
    "files of mails": HEAD + b"--b\nContent-Type: x; name=a.eml\n\n" * 60_000,
    "chunks": b"Subject: Front door\nContent-Transfer-Encoding: base64\n\n" + b"A=" * 1_000_000,
    "parameters": b"Subject: Front door\nContent-Type: multipart/mixed" + b'; x="' * 400_000,
    "semicolons": b"Subject: Front door\nContent-Type: text/plain" + b";" * 60_000 + b"\n\n",
    "parentheses": b"Subject: Front door\nFrom: " + b"(" * 60_000 + b"\n\n",
    "a tree of multiparts": HEAD + b"".join(b"--%c\nContent-Type: multipart/x; boundary=%c\n\n" % (n, n) for n in b"bcdefghijk" * 8_000),
}  # fmt: skip


@pytest.mark.parametrize("form", COSTLY)
def test_mail_that_is_costly_to_read_is_an_alert_within_a_second_and_little_memory(form: str) -> None:
    began = time.process_time()
    assert alert_of(COSTLY[form]).event == "DOOR_OPENED"
    assert time.process_time() - began < 1
    tracemalloc.start()
    read_camera_mail(COSTLY[form])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


WORDS = [
    b"Subject: x", b"Content-Type: ", b"multipart/mixed", b"message/rfc822", b"text/html", b"; boundary=b", b"; charset=", b"gb2312", b"utf-16", b"iso-2022-jp",
    b"Content-Transfer-Encoding: ", b"base64", b"quoted-printable", b"\n", b"\n", b"\n\n", b"--b", b"--b--", b"--", b"\x00", b"\xff\xfe", b"\xe9", b"=?utf-8?b?",
    b"?=", b"=", b"/9j/4AAQ", B64.encode(), b"begin 644 x\n", b"!AA", b"end", b"Alarm Event: ", b"Channel Name: ", b":", b"\xef\xbc\x9a", b"<td>", b"<style>", b"&#",
    b"name*0*=", b'"', b"(", b"\x1b$B", b"From ", b"\xef\xbb\xbf", b"Stop", "Тревога".encode("cp1251"),
]  # fmt: skip


def test_whatever_a_mail_holds_it_is_an_alert_or_an_end_and_never_an_exception() -> None:
    chance = random.Random(2047)
    for _ in range(3000):
        content = b"".join(chance.choice(WORDS) for _ in range(chance.randrange(1, 60)))
        assert len(alerts_of(content)) <= 1
    mails = [form.encode() for form in WRITTEN.values() if len(form) < 5000]
    for _ in range(3000):
        content = bytearray(chance.choice(mails))
        for _ in range(chance.randrange(1, 20)):
            at = chance.randrange(len(content))
            content[at : at + chance.randrange(4)] = chance.choice([b"", chance.choice(WORDS), chance.randbytes(2)])
        assert len(alerts_of(bytes(content))) <= 1


def test_words_of_a_header_never_raise() -> None:
    chance = random.Random(2231)
    for _ in range(3000):
        text = "".join(chance.choice(["=?", "utf-8", "?", "q", "b", "?=", " ", "=", "A", "Qg==", "\ud800", "\n", "_", "gbk"]) for _ in range(20))
        assert isinstance(decode_words(text, lenient=True), str)
